"""`jaxkv demo`: four questions behind one system prompt, held against dense attention."""

import argparse
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cli.generate import STEPS_A_BLOCK, fitting_config, pages, speed
from jaxkv.cli.progress import Status, Watch, load_with_progress
from jaxkv.config import CacheConfig
from jaxkv.generating import Generation, generate
from jaxkv.models import LoadedModel, Tokenizer, dense_logits
from pallas_kernels.dispatch import auto_backend

SYSTEM_PROMPT = (
    "You are a helpful AI assistant who answers questions about geography, science and daily life. Your "
    "users are curious people who want short, correct and friendly answers. Answer each question in one or "
    "two complete sentences, in plain English."
)
QUESTIONS = (
    "What is the capital of France?",
    "What is the largest planet in our solar system?",
    "What is photosynthesis?",
    "Give me a tip for learning to cook.",
)


def run_demo(options: argparse.Namespace) -> int:
    """`jaxkv demo`: four questions behind one system prompt, held against dense attention."""
    loaded, tokenizer = load_with_progress(options.model)
    ids = demo_prompts(tokenizer)
    config = fitting_config(loaded, ids, options, 1, None)
    with Watch(tokenizer, options.max_new_tokens, stream=False) as watch:
        result = generate(
            loaded.model,
            config,
            ids,
            max_new_tokens=options.max_new_tokens,
            stop_tokens=tokenizer.stop_tokens,
            block=STEPS_A_BLOCK,
            keep_logits=True,
            warm_up=True,
            on_tokens=watch.see,
        )
    with Status("dense attention over the same tokens"):
        difference = _largest_difference(loaded, ids, result)
    for question, text in zip(QUESTIONS, watch.texts.texts, strict=True):
        print(f"> {question}\n{text.strip()}\n")
    device, backend = jax.devices()[0], auto_backend()
    rows = {
        "model": f"{loaded.name}, cache in {config.quantization or config.dtype}",
        "speed": speed(result),
        "pages": pages(config, result),
        "memory": _memory(config, result),
        "largest |Δlogit| against dense attention": f"{difference:.2e}",
        "attention backend": f"{backend.name} on {device.device_kind} ({device.platform})",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _largest_difference(loaded: LoadedModel, prompts: list[list[int]], result: Generation) -> float:
    """Between the logits each token was drawn from and those of a dense forward of the whole text."""
    whole = [prompt + samples[0] for prompt, samples in zip(prompts, result.tokens, strict=True)]
    lengths = np.array([len(tokens) for tokens in whole], np.int32)
    padded = np.zeros((len(whole), lengths.max()), np.int32)
    for row, tokens in zip(padded, whole, strict=True):
        row[: len(tokens)] = tokens
    dense = np.asarray(jax.jit(dense_logits)(loaded.model, jnp.asarray(padded), jnp.asarray(lengths)))
    paged, largest = np.asarray(result.logits), 0.0
    for row, (prompt, samples) in enumerate(zip(prompts, result.tokens, strict=True)):
        count, start = len(samples[0]), len(prompt) - 1
        largest = max(largest, np.abs(paged[row, :count] - dense[row, start : start + count]).max())
    return float(largest)


def demo_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the demo's questions, each behind the one system prompt."""
    system = {"role": "system", "content": SYSTEM_PROMPT}
    return [tokenizer.encode_chat([system, {"role": "user", "content": question}]) for question in QUESTIONS]


def _memory(config: CacheConfig, result: Generation) -> str:
    used = result.peak_pages * config.page_bytes / 2**20
    text = f"{used:.1f} MiB of K and V at the peak"
    if config.quantization is None:
        return text
    whole = result.peak_pages * replace(config, quantization=None).page_bytes / 2**20
    return f"{text}, {whole:.1f} in {config.dtype} ({100 * (1 - used / whole):.0f}% saved)"
