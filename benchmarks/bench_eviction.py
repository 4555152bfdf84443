"""What does an eviction policy cost? As a share of a decode step, and as the pool grows.

Share: SmolLM2 decodes one sequence of 1,024 tokens, without a policy and under each, in blocks of 64 tokens;
the end of every page evicts. The cost is what a token takes longer: the attention each token received, the
state, the evictions. Without a policy the cache is cut back to 1,024 after each block, untimed.

Growth: an eviction of 64 sequences at once, out of a pool of 2^14 pages and one of 2^20. Target: at most
twice the time.

    python -m benchmarks.bench_eviction [--quick]

Exit status: 0, or 1 where a target is missed. The last line of output is one JSON document.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.publishing import publish
from jaxkv.decode import decode, prefill, start
from jaxkv.models import LoadedModel, load
from jaxkv.policies import (
    HeavyHitter,
    LeastRecentlyUsed,
    Policy,
    PromptCompress,
    SemanticMerge,
    SlidingWindow,
)
from jaxkv.tune.timing import interleave, microseconds, stopwatch, times

BUDGET, BLOCK, PAGE_SIZE, CHUNK = 1024, 64, 16, 256
GROWTH_TARGET = 2
ROPE = jaxkv.Rope.of(8, 10000.0)
POLICIES: dict[str, Policy] = {
    "SlidingWindow": SlidingWindow(BUDGET - 4, 4),
    "LeastRecentlyUsed": LeastRecentlyUsed(BUDGET),
    "HeavyHitter": HeavyHitter(BUDGET, BUDGET // 2),
    "SemanticMerge": SemanticMerge(BUDGET, BUDGET // 2),
}
GROWING: dict[str, Policy] = {
    "SlidingWindow": SlidingWindow(60, 4),
    "SlidingWindow, moving up": SlidingWindow(28, 4, positions="cache", rope=ROPE),
    "LeastRecentlyUsed": LeastRecentlyUsed(64),
    "HeavyHitter": HeavyHitter(64, 32),
    "SemanticMerge": SemanticMerge(64, 32),
}


def decoding(loaded: LoadedModel, policy: Policy | None, rounds: int) -> Callable[[], float]:
    """Blocks of decode steps of one sequence that is as long as the budget."""
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))[:BUDGET]
    config = loaded.config.cache_config(
        num_pages=(BUDGET + CHUNK + BLOCK) // PAGE_SIZE + 2, page_size=PAGE_SIZE, max_seqs=1, dtype="float32"
    )
    seqs, read = jnp.zeros(1, jnp.int32), jax.jit(prefill, donate_argnames="cache")
    cache, logits = jaxkv.init(config, policy), jnp.zeros(0)
    for chunk in np.split(np.asarray(ids, np.int32), BUDGET // CHUNK):
        logits, cache, _ = read(loaded.model, cache, seqs, jnp.full(1, CHUNK), chunk)
    room = (rounds + 4) * BLOCK
    begin = partial(start, max_new_tokens=room, sampling=jaxkv.Sampling())
    held = [begin(cache, seqs, logits, jax.random.key(0))]
    run = jax.jit(partial(decode, sampling=jaxkv.Sampling()), donate_argnames="state")
    cut = jax.jit(jaxkv.truncate, donate_argnames="cache")

    def block() -> float:
        until = held[0].step + BLOCK
        seconds, held[0] = stopwatch(lambda: run(loaded.model, held[0], until))
        if policy is None:
            # The slots that it began with went into its state, which is donated.
            cache, _ = cut(held[0].cache, jnp.zeros(1, jnp.int32), jnp.full(1, BUDGET))
            held[0] = jax.block_until_ready(replace(held[0], cache=cache))
        return seconds

    return block


def share(loaded: LoadedModel, rounds: int) -> dict[str, Any]:
    """Prints and returns what a token takes, and how much more under each policy."""
    runs = {None: decoding(loaded, None, rounds)}
    runs |= {name: decoding(loaded, policy, rounds) for name, policy in POLICIES.items()}
    seconds, rows = interleave(runs, rounds=rounds, warm_up=2), {}
    print(f"one sequence of {BUDGET} tokens\n\n{'policy':<22}{'ms a token':>11}   share of the step")
    for name, sample in seconds.items():
        ratio = sample.over(seconds[None])
        low, high = (100 * (value - 1) for value in ratio.quartiles)
        cost = "" if name is None else f"{100 * (ratio.median - 1):+.1f}% ({low:+.1f} to {high:+.1f})"
        print(f"{name or 'none':<22}{1e3 * sample.median / BLOCK:>11.2f}   {cost}")
        rows[name or "none"] = {"seconds_a_block": sample.as_json(), "ratio": ratio.as_json()}
    return rows


def eviction(policy: Policy, num_pages: int) -> Callable[[], float]:
    """Evicts from 64 sequences, which then grow again, untimed."""
    config = jaxkv.CacheConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_seqs=64,
        max_pages_per_seq=10,
        dtype="float32",
    )
    seqs, most = jnp.arange(64, dtype=jnp.int32), 128
    grow = jax.jit(jaxkv.allocate, static_argnames="total_tokens", donate_argnames="cache")
    evict = jax.jit(jaxkv.evict, donate_argnames="cache")
    held = [jaxkv.init(config, policy)]

    def run() -> float:
        more = most - held[0].table.lengths
        held[0] = jax.block_until_ready(grow(held[0], seqs, more, total_tokens=64 * most)[0])
        seconds, (held[0], dropped) = stopwatch(lambda: evict(held[0], seqs))
        assert int(jnp.min(dropped)) > 0
        return seconds

    return run


def growth(rounds: int) -> dict[str, Any]:
    """Prints and returns the time of an eviction by size of the pool."""
    sizes, rows = (2**14, 2**20), {}
    print(f"\nevicting from 64 sequences, us\n\n{'policy':<28}{'2^14 pages':>22}{'2^20 pages':>22}   growth")
    for name, policy in GROWING.items():
        runs = {size: eviction(policy, size) for size in sizes}
        seconds = interleave(runs, rounds=rounds, repeats=3)
        small, large = (seconds[size] for size in sizes)
        ratio = large.over(small)
        verdict = "ok" if ratio.median <= GROWTH_TARGET else "MISSED"
        print(
            f"{name:<28}{microseconds(small):>22}{microseconds(large):>22}   {times(ratio)}  {verdict}",
            flush=True,
        )
        rows[name] = {"small": small.as_json(), "large": large.as_json(), "ratio": ratio.as_json()}
    return rows


def once(loaded: LoadedModel) -> float:
    """Prints and returns the seconds that `PromptCompress` takes after a prompt of twice the budget."""
    policy, seqs = PromptCompress(BUDGET, 32), jnp.zeros(1, jnp.int32)
    config = loaded.config.cache_config(num_pages=2 * BUDGET // PAGE_SIZE, max_seqs=1, dtype="float32")
    cache = jaxkv.init(config, policy)
    cache, batch = jaxkv.allocate(cache, seqs, jnp.full(1, 2 * BUDGET), total_tokens=2 * BUDGET)
    mass = jnp.ones((config.num_layers, 1, config.num_kv_heads, config.max_tokens_per_seq))
    cache, cut = jaxkv.observe(cache, batch, mass), jax.jit(jaxkv.evict)
    seconds = [stopwatch(cut, cache, seqs)[0] for _ in range(6)][1:]
    print(f"\nPromptCompress, once: {1e3 * np.median(seconds):.0f} ms for {2 * BUDGET} tokens to {BUDGET}")
    return float(np.median(seconds))


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description="What does an eviction policy cost?")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing kept")
    options = parser.parse_args()
    rounds = 3 if options.quick else 9
    loaded = load("smollm2-135m", dtype="float32")
    shares, cut = share(loaded, rounds), once(loaded)
    grown = growth(3 * rounds)
    missed = [name for name, row in grown.items() if row["ratio"]["median"] > GROWTH_TARGET]
    print(f"\ntargets missed: {', '.join(missed) or 'none'}\n")
    document = {"share": shares, "prompt_compress_seconds": cut, "growth": grown, "targets_missed": missed}
    publish("eviction", document, keep=not options.quick)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
