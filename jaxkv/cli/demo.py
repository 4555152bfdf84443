"""`jaxkv demo`: four questions after one system prompt, compared with dense attention."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cli.compilation_cache import keep_programs
from jaxkv.cli.options import EPILOG, add_common, add_known_model
from jaxkv.cli.pool import fitting_config
from jaxkv.cli.prompts import QUESTIONS, demo_prompts
from jaxkv.cli.report import found, pages, speed
from jaxkv.config import CacheConfig
from jaxkv.generating import generate
from jaxkv.generation import Generation
from pallas_kernels.dispatch import auto_backend

if TYPE_CHECKING:
    from jaxkv.models import LoadedModel  # which needs an extra

HELP = "four prompts after one shared system prompt, checked"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `jaxkv demo`."""
    command.epilog = EPILOG
    add_known_model(command)
    add_common(command)


def run(options: argparse.Namespace) -> int:
    """Prints the answers and the largest difference to dense attention; returns the exit code."""
    keep_programs(options.compilation_cache, enabled=not options.no_compilation_cache)
    from jaxkv.cli.progress import STEPS_A_BLOCK, Status, Watch, load_with_progress

    loaded, tokenizer = load_with_progress(options.model)
    ids = demo_prompts(tokenizer)
    config = fitting_config(loaded, ids, options, 1, None, prefix_cache=True)
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
        "prompts": found(result),
        "pages": pages(config, result),
        "memory": _memory(config, result),
        "largest |Δlogit| against dense attention": f"{difference:.2e}",
        "attention backend": f"{backend.name} on {device.device_kind} ({device.platform})",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _largest_difference(loaded: "LoadedModel", prompts: list[list[int]], result: Generation) -> float:
    """Compares the logits of each drawn token with those of one dense forward pass of the whole text."""
    from jaxkv.models import dense_logits

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


def _memory(config: CacheConfig, result: Generation) -> str:
    used = result.peak_pages * config.page_bytes / 2**20
    text = f"{used:.1f} MiB of K and V at the peak"
    if config.quantization is None:
        return text
    whole = result.peak_pages * replace(config, quantization=None).page_bytes / 2**20
    return f"{text}, {whole:.1f} in {config.dtype} ({100 * (1 - used / whole):.0f}% saved)"
