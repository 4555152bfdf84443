"""What the commands show: progress on standard error, texts and figures on standard output."""

import argparse
import sys
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from jaxkv.cli import KV_DTYPES
from jaxkv.config import CacheConfig
from jaxkv.decode import Decoding, Finish
from jaxkv.generate import PREFILL_CHUNK, Generation, generate
from jaxkv.invariants import SequenceTooLongError
from jaxkv.models import LoadedModel, Tokenizer, dense_logits, load
from jaxkv.policies import Policy, PromptCompress
from jaxkv.policies.parse import parse_policy
from jaxkv.rope import Rope
from jaxkv.sampling import Sampling
from jaxkv.sizing import pool_sizes, token_slots
from jaxkv.telemetry import Telemetry
from pallas_kernels.dispatch import auto_backend

_STEPS_A_BLOCK = 8

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


def run_generate(options: argparse.Namespace, prompts: list[str]) -> int:
    """`jaxkv generate`."""
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    if options.policy is not None:
        # Before the weights are read: a mistake is seen at once.
        parse_policy(options.policy, rope=Rope((1.0,)))
    with _metrics(options.metrics_port) as observe:
        return _generate(options, prompts, sampling, observe)


def _generate(options: argparse.Namespace, prompts: list[str], sampling: Sampling, observe) -> int:
    loaded, tokenizer = load_with_progress(options.model)
    if options.chat:
        system = [{"role": "system", "content": options.system}] if options.system else []
        ids = [tokenizer.encode_chat([*system, {"role": "user", "content": prompt}]) for prompt in prompts]
    else:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
    policy = parse_policy(options.policy, rope=loaded.config.rope) if options.policy is not None else None
    config = fitting_config(loaded, ids, options, options.num_samples, options.num_pages, policy)
    alone = len(prompts) * options.num_samples == 1

    def see(state: Decoding) -> None:
        observe(state.cache)
        watch.see(state)

    with _Watch(tokenizer, options.max_new_tokens, stream=alone) as watch:
        result = generate(
            loaded.model,
            config,
            ids,
            max_new_tokens=options.max_new_tokens,
            num_samples=options.num_samples,
            sampling=sampling,
            stop_tokens=tokenizer.stop_tokens,
            key=jax.random.key(options.seed),
            block=_STEPS_A_BLOCK,
            warm_up=True,
            on_tokens=see,
            policy=policy,
        )
    if not alone:
        for prompt, texts in zip(prompts, _texts(tokenizer, result), strict=True):
            for text in texts:
                print(f"\n> {prompt}\n{text}")
    print(f"\n{_speed(result)}\n{_pages(config, result)}", file=sys.stderr)
    if policy is not None:
        print(_evicted(result, str(options.policy)), file=sys.stderr)
    return 0


@contextmanager
def _metrics(port: int | None):
    """What to show each block's cache to; served over HTTP while the block runs, if there is a port."""
    if port is None:
        yield lambda cache: None
        return
    telemetry = Telemetry()
    with telemetry.serve(port) as server:
        print(f"metrics: {server.url}", file=sys.stderr, flush=True)
        yield telemetry.observe
        telemetry.flush()


def run_demo(options: argparse.Namespace) -> int:
    """`jaxkv demo`: four questions behind one system prompt, held against dense attention."""
    loaded, tokenizer = load_with_progress(options.model)
    ids = demo_prompts(tokenizer)
    config = fitting_config(loaded, ids, options, 1, None)
    with _Watch(tokenizer, options.max_new_tokens, stream=False) as watch:
        result = generate(
            loaded.model,
            config,
            ids,
            max_new_tokens=options.max_new_tokens,
            stop_tokens=tokenizer.stop_tokens,
            block=_STEPS_A_BLOCK,
            keep_logits=True,
            warm_up=True,
            on_tokens=watch.see,
        )
    with status_line("dense attention over the same tokens"):
        difference = _largest_difference(loaded, ids, result)
    for question, (text,) in zip(QUESTIONS, _texts(tokenizer, result), strict=True):
        print(f"> {question}\n{text}\n")
    device, backend = jax.devices()[0], auto_backend()
    rows = {
        "model": f"{loaded.name}, cache in {config.quantization or config.dtype}",
        "speed": _speed(result),
        "pages": _pages(config, result),
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


def load_with_progress(path_or_name: str) -> tuple[LoadedModel, Tokenizer]:
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=_console(), transient=True) as progress:
        task = progress.add_task("weights", total=None)
        loaded = load(
            path_or_name,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if loaded.tokenizer is None:
        raise ValueError(f"{path_or_name}: has no tokenizer.json")
    return loaded, loaded.tokenizer


def fitting_config(
    loaded: LoadedModel,
    ids: list[list[int]],
    options: argparse.Namespace,
    num_samples: int,
    num_pages: int | None,
    policy: Policy | None = None,
) -> CacheConfig:
    """A pool that holds every sequence at its longest, unless the user says how many pages."""
    size = options.page_size
    slots = [
        _places(loaded, f"prompt {number}", len(tokens), options, policy) for number, tokens in enumerate(ids)
    ]
    sizes = pool_sizes([len(tokens) for tokens in ids], slots, num_samples, size, policy)
    if num_pages is not None:
        row = min(sizes["max_pages_per_seq"], num_pages)
        sizes |= dict(num_pages=num_pages, max_pages_per_seq=row)
    dtype, quantization = KV_DTYPES.get(options.kv_dtype, (None, None))
    dtype = {} if dtype is None else {"dtype": dtype}
    return loaded.model.cache_config(**sizes, **dtype, quantization=quantization)


def _places(
    loaded: LoadedModel, name: str, num_tokens: int, options: argparse.Namespace, policy: Policy | None
) -> int:
    """Token slots that a prompt and what it is continued with take at most, within the trained context."""
    context, new, page_size = loaded.config.max_context, options.max_new_tokens, options.page_size
    bounded = policy is not None and policy.observe_last is None
    if num_tokens > context and not bounded:
        raise SequenceTooLongError(f"{name} has {num_tokens} tokens; {loaded.name} was trained on {context}")
    config = loaded.config.cache_config
    slots = token_slots(config, page_size, num_tokens, new, policy, PREFILL_CHUNK)
    if policy is None:
        return min(slots, context)
    if isinstance(policy, PromptCompress):
        reached = new + (num_tokens if policy.positions == "original" else min(num_tokens, policy.budget))
        if reached > context:
            raise SequenceTooLongError(
                f"{name} and {new} new tokens reach position {reached} with --policy {options.policy}, which "
                f"keeps all new ones; {loaded.name} was trained on {context}"
            )
        return slots
    positions = policy.most_positions(config(num_pages=1, page_size=page_size))
    reached = num_tokens + new if positions is None else positions + min(num_tokens, PREFILL_CHUNK)
    if reached > context:
        advice = "positions=cache goes on for ever" if positions is None else "keep less"
        raise SequenceTooLongError(
            f"{name} and {new} new tokens reach position {reached} with --policy {options.policy}; "
            f"{loaded.name} was trained on {context}: {advice}"
        )
    return slots


def _evicted(result: Generation, policy: str) -> str:
    stats = result.cache.stats
    times, tokens = int(stats.evictions), int(stats.evicted_tokens)
    return f"{policy}: gave up {tokens} token places in {times} eviction{'s' * (times != 1)}"


def _texts(tokenizer: Tokenizer, result: Generation) -> list[list[str]]:
    return [[tokenizer.decode(tokens).strip() for tokens in samples] for samples in result.tokens]


def _speed(result: Generation) -> str:
    prefill = result.prefill_tokens / max(result.prefill_seconds, 1e-9)
    # The first token of each sequence comes from its prefill.
    decoded = result.num_new_tokens - sum(len(samples) for samples in result.tokens)
    decode = decoded / max(result.decode_seconds, 1e-9)
    return (
        f"prefill {result.prefill_tokens} tokens at {prefill:.0f} tokens/s, "
        f"decode {decoded} tokens at {decode:.1f} tokens/s"
    )


def _pages(config: CacheConfig, result: Generation) -> str:
    used, alone = result.peak_pages, result.peak_pages_unshared
    text = f"{used} pages of {config.page_size} tokens at the peak"
    if used < alone:
        text += f", {alone} without sharing ({100 * (1 - used / alone):.0f}% saved)"
    cut = sum(reason is Finish.OUT_OF_PAGES for samples in result.finish for reason in samples)
    return text + (f"; {cut} sequences ended early, out of pages" if cut else "")


def _memory(config: CacheConfig, result: Generation) -> str:
    used = result.peak_pages * config.page_bytes / 2**20
    text = f"{used:.1f} MiB of K and V at the peak"
    if config.quantization is None:
        return text
    whole = result.peak_pages * replace(config, quantization=None).page_bytes / 2**20
    return f"{text}, {whole:.1f} in {config.dtype} ({100 * (1 - used / whole):.0f}% saved)"


def _console() -> Console:
    return Console(stderr=True)


@contextmanager
def status_line(text: str):
    with _console().status(text):
        yield


class _Watch:
    """Shows a generation under way: its text if there is one sequence, else how far it is."""

    def __init__(self, tokenizer: Tokenizer, max_new_tokens: int, *, stream: bool):
        self._text = tokenizer.stream() if stream else None
        self._most, self._shown = max_new_tokens, 0
        self._status = _console().status("compiling")

    def __enter__(self) -> "_Watch":
        self._status.start()
        return self

    def __exit__(self, *exception) -> None:
        self._status.stop()
        if self._text is not None and self._shown:
            print(self._text.flush(), flush=True)

    def see(self, state: Decoding) -> None:
        """Called after each block of steps."""
        counts = np.asarray(state.num_generated)
        if self._text is None:
            running = int(np.sum(np.asarray(state.finish) == Finish.RUNNING))
            self._status.update(f"decoding: {counts.max()} of {self._most} tokens, {running} running")
            return
        self._status.stop()
        tokens = np.asarray(state.output)[0, self._shown : counts[0]].tolist()
        self._shown = int(counts[0])
        print(self._text.push(tokens), end="", flush=True)
