"""`jaxkv generate`: texts on standard output, figures on standard error; and the pool a command needs."""

import argparse
import sys
from contextlib import contextmanager

import jax
import numpy as np

from jaxkv.cli_options import KV_DTYPES
from jaxkv.config import CacheConfig
from jaxkv.decode import Decoding, Finish
from jaxkv.generate import PREFILL_CHUNK, Generation, generate
from jaxkv.invariants import SequenceTooLongError
from jaxkv.models import LoadedModel, Tokenizer
from jaxkv.policies import Policy, PromptCompress
from jaxkv.policies.parse import parse_policy
from jaxkv.rope import Rope
from jaxkv.sampling import Sampling
from jaxkv.sizing import pool_sizes, token_slots
from jaxkv.telemetry import Telemetry
from jaxkv.terminal_progress import Watch, load_with_progress

STEPS_A_BLOCK = 8


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
    ids = _token_ids(tokenizer, prompts, options)
    policy = parse_policy(options.policy, rope=loaded.config.rope) if options.policy is not None else None
    config = fitting_config(loaded, ids, options, options.num_samples, options.num_pages, policy)
    alone = len(prompts) * options.num_samples == 1

    def see(state: Decoding) -> np.ndarray:
        observe(state.cache)
        return watch.see(state)

    with Watch(tokenizer, options.max_new_tokens, stream=alone, stop=options.stop) as watch:
        result = generate(
            loaded.model,
            config,
            ids,
            max_new_tokens=options.max_new_tokens,
            num_samples=options.num_samples,
            sampling=sampling,
            stop_tokens=tokenizer.stop_tokens,
            key=jax.random.key(options.seed),
            block=STEPS_A_BLOCK,
            warm_up=True,
            on_tokens=see,
            policy=policy,
        )
    if not alone:
        for number, text in enumerate(watch.texts.texts):
            print(f"\n> {prompts[number // options.num_samples]}\n{text.strip()}")
    print(f"\n{speed(result)}\n{pages(config, result)}", file=sys.stderr)
    if policy is not None:
        print(_evicted(result, str(options.policy)), file=sys.stderr)
    return 0


def _token_ids(tokenizer: Tokenizer, prompts: list[str], options: argparse.Namespace) -> list[list[int]]:
    """A prompt in a conversation must not end its turn, unless the user says so."""
    parse = not options.chat if options.parse_special is None else options.parse_special
    if not options.chat:
        return [tokenizer.encode(prompt, parse_special=parse) for prompt in prompts]
    system = [{"role": "system", "content": options.system}] if options.system else []
    chats = ([*system, {"role": "user", "content": prompt}] for prompt in prompts)
    return [tokenizer.encode_chat(chat, parse_special=parse) for chat in chats]


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
    bounded = policy is not None and not policy.once
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


def speed(result: Generation) -> str:
    prefill = result.prefill_tokens / max(result.prefill_seconds, 1e-9)
    # The first token of each sequence comes from its prefill.
    decoded = result.num_new_tokens - sum(bool(tokens) for samples in result.tokens for tokens in samples)
    decode = decoded / max(result.decode_seconds, 1e-9)
    return (
        f"prefill {result.prefill_tokens} tokens at {prefill:.0f} tokens/s, "
        f"decode {decoded} tokens at {decode:.1f} tokens/s"
    )


def pages(config: CacheConfig, result: Generation) -> str:
    used, alone = result.peak_pages, result.peak_pages_unshared
    text = f"{used} pages of {config.page_size} tokens at the peak"
    if used < alone:
        text += f", {alone} without sharing ({100 * (1 - used / alone):.0f}% saved)"
    cut = sum(reason is Finish.OUT_OF_PAGES for samples in result.finish for reason in samples)
    return text + (f"; {cut} sequences ended early, out of pages" if cut else "")
