"""What does memory come to? Growth with length, waste by page size, appending, and what sharing saves.

  growth    K and V of one sequence by its length, for three shapes: what its tokens need, and what its
            pages take. Arithmetic on `CacheConfig`; the bytes a token below it are read off real arrays.
  models    weights, and K and V of 8,192 tokens in bfloat16, of the models in `configs/models`.
  waste     by page size, for sequences of chat, document and mixed lengths: places that hold no token,
            pages, and the page table, counted in a cache that is really run.
  append    1, 16, 64 and 256 tokens a call until a sequence has 4,096: pages, and time a token.
  sharing   three users of 100, 150 and 200 tokens behind one prompt of 512: run with `allocate` and
            `fork`, and again without.

Figures in circulation that are wrong, and the right ones beside them, are in `CORRECTED`. Each is checked.

    python -m benchmarks.bench_memory [--quick]

The last line of output is one JSON document; unless `--quick`, it is also written under `results/`.
Exit status: 0, or 1 where a figure is not what it must be.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.publishing import publish
from jaxkv import catalog
from jaxkv.memory.profile import MemoryProfile, unused_share
from jaxkv.planner import ModelShape, kv_cache_bytes
from jaxkv.tune.timing import interleave, stopwatch
from jaxkv.units import format_bytes

# Layers, KV heads, head_dim, dtype.
SHAPES = {
    "22 x 32 x 64, float32": (22, 32, 64, "float32"),
    "80 x 64 x 128, float32": (80, 64, 128, "float32"),
    "32 x 8 x 128, bfloat16": (32, 8, 128, "bfloat16"),
}
# What is in circulation, and what 2 x layers x heads x head_dim x bytes is.
CORRECTED = {
    "22 x 32 x 64, float32": (288_672, 360_448),
    "80 x 64 x 128, float32": (3_276_800, 5_242_880),
}
LENGTHS = (1, 100, 500, 2000, 8000, 32000, 128000)
PAGE_SIZES = (1, 8, 16, 32, 64, 128, 256)
APPENDS, APPEND_TOKENS, ROUNDS = (1, 16, 64, 256), 4096, 7
PROMPT, USERS, SHARED_PAGES, UNSHARED_PAGES = 512, (100, 150, 200), 62, 126

_allocate = jax.jit(jaxkv.allocate, static_argnames="total_tokens", donate_argnames="cache")
_fork = jax.jit(jaxkv.fork, donate_argnames="cache")
_profile = jax.jit(jaxkv.memory_profile)


def small_config(page_size: int, num_pages: int, num_seqs: int) -> jaxkv.CacheConfig:
    """Bookkeeping at full size, K and V of one number a token."""
    return jaxkv.CacheConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        num_pages=num_pages,
        page_size=page_size,
        max_seqs=num_seqs,
        dtype="float32",
    )


def run_lengths(lengths: list[int], page_size: int) -> MemoryProfile:
    """A cache that holds sequences of these lengths, and no page more."""
    pages = sum(-(-length // page_size) for length in lengths)
    cache = jaxkv.init(small_config(page_size, pages, len(lengths)))
    longest = max(lengths)
    cache, batch = _allocate(
        cache, jnp.arange(len(lengths)), jnp.asarray(lengths, jnp.int32), total_tokens=longest * len(lengths)
    )
    jaxkv.raise_for_status(batch)
    return jax.device_get(_profile(cache))


def growth() -> list[dict]:
    """Bytes of one sequence by its length."""
    rows = []
    print(f"\ngrowth of one sequence, pages of 16\n{'shape':<26}{'tokens':>8}{'K and V':>14}{'in pages':>14}")
    for name, (layers, heads, head_dim, dtype) in SHAPES.items():
        config = jaxkv.CacheConfig(
            num_layers=layers, num_kv_heads=heads, head_dim=head_dim, num_pages=8192, dtype=dtype
        )
        a_token = config.page_bytes // config.page_size
        for length in LENGTHS:
            held = config.pages_for(length) * config.page_bytes
            print(f"{name:<26}{length:>8,}{format_bytes(length * a_token):>14}{format_bytes(held):>14}")
            rows.append({"shape": name, "tokens": length, "bytes": length * a_token, "page_bytes": held})
    return rows


def models() -> list[dict]:
    """Parameters and bytes of the known models."""
    rows = []
    print("\nmodels, 8,192 tokens in bfloat16; reserved is the pool of the cache")
    print(f"{'model':<20}{'parameters':>18}{'exact':>14}{'reserved':>14}{'a token':>14}")
    for name in catalog.names("models"):
        shape = ModelShape.from_config(name)
        counted = kv_cache_bytes(shape, 8192, kv_dtype="bf16")
        exact, reserved, a_token = (
            counted.exact,
            counted.reserved,
            2 * shape.elements_per_token * shape.num_layers,
        )
        print(
            f"{name:<20}{shape.num_parameters:>18,}{format_bytes(exact):>14}{format_bytes(reserved):>14}"
            f"{format_bytes(a_token):>14}"
        )
        rows.append({"model": name, "parameters": shape.num_parameters, "exact": exact, "reserved": reserved})
    return rows


def corrections() -> tuple[list[dict], bool]:
    """Bytes a token that are often given wrong, worked out and read off a cache of that shape."""
    rows = []
    print("\nbytes a token")
    for name, (wrong, right) in CORRECTED.items():
        layers, heads, head_dim, dtype = SHAPES[name]
        config = jaxkv.CacheConfig(
            num_layers=layers, num_kv_heads=heads, head_dim=head_dim, num_pages=1, page_size=1, dtype=dtype
        )
        pool = jaxkv.init(config).pool
        found = sum(x.nbytes for x in jax.tree.leaves(pool))
        terms = f"2 x {layers} layers x {heads} heads x {head_dim} x 4 bytes"
        print(f"{found:>11,} = {terms}: one token's arrays. Not {wrong:,}, as is in circulation")
        rows.append({"shape": name, "bytes": found, "in_circulation": wrong, "right": found == right})
    return rows, all(row["right"] for row in rows)


def waste(quick: bool) -> tuple[list[dict], bool]:
    """Places without a token, by page size and kind of traffic."""
    random, count = np.random.default_rng(0), 16 if quick else 64
    kinds = {
        "chat, 20 to 400 tokens": random.integers(20, 401, count),
        "documents, 1,000 to 4,000": random.integers(1000, 4001, count),
        "mixed, 1 to 4,000": np.exp(random.uniform(0, np.log(4000), count)).astype(int).clip(1),
    }
    rows, agrees = [], True
    print(
        f"\nwaste, {count} sequences\n{'lengths':<28}{'page size':>10}{'waste':>8}{'pages':>9}{'table':>12}"
    )
    for kind, lengths in kinds.items():
        for page_size in PAGE_SIZES:
            profile = run_lengths(lengths.tolist(), page_size)
            agrees &= profile.fragmentation == unused_share(lengths.tolist(), page_size)
            row = -(-int(lengths.max()) // page_size)
            table = replace(profile, config=replace(profile.config, max_pages_per_seq=row)).page_table_bytes
            print(
                f"{kind:<28}{page_size:>10}{profile.fragmentation:>8.1%}"
                f"{profile.physical_pages:>9,}{format_bytes(table):>12}"
            )
            rows.append(
                {
                    "lengths": kind,
                    "page_size": page_size,
                    "waste": profile.fragmentation,
                    "pages": profile.physical_pages,
                    "table_bytes": table,
                }
            )
    return rows, agrees


def appending(rounds: int) -> tuple[list[dict], bool]:
    """One sequence grows to `APPEND_TOKENS` in steps: `allocate` and `append` of one layer, 8 x 128."""
    config = replace(
        small_config(16, APPEND_TOKENS // 16, 1), num_kv_heads=8, head_dim=128, max_pages_per_seq=None
    )
    free, pages = jax.jit(jaxkv.free, donate_argnames="cache"), {}

    def appending(tokens: int) -> Callable[[], float]:
        state = [jaxkv.init(config)]
        step = jax.jit(_extend, static_argnames="tokens", donate_argnames="cache")
        k = jnp.ones((tokens, config.num_kv_heads, config.head_dim))

        def grow(cache):
            for _ in range(APPEND_TOKENS // tokens):
                cache = step(cache, k, tokens=tokens)
            return cache

        def run() -> float:
            state[0] = jax.block_until_ready(free(state[0], jnp.zeros(1, jnp.int32)))
            before = int(state[0].stats.total_allocations)
            seconds, state[0] = stopwatch(grow, state[0])
            pages[tokens] = int(state[0].stats.total_allocations) - before
            return seconds / APPEND_TOKENS

        return run

    samples = interleave({tokens: appending(tokens) for tokens in APPENDS}, rounds=rounds, warm_up=1)
    print(f"\nappending to {APPEND_TOKENS:,} tokens, pages of 16, one layer of 8 x 128 in float32")
    print(f"{'tokens a call':>13}{'calls':>7}{'pages':>7}{'pages a call':>14}{'us a token':>22}")
    rows = []
    for tokens, sample in samples.items():
        calls = APPEND_TOKENS // tokens
        print(f"{tokens:>13}{calls:>7}{pages[tokens]:>7}{pages[tokens] / calls:>14.4g}{_micro(sample):>22}")
        rows.append(
            {"tokens": tokens, "calls": calls, "pages": pages[tokens], "seconds_a_token": sample.as_json()}
        )
    return rows, set(pages.values()) == {APPEND_TOKENS // 16}


def _extend(cache, k, *, tokens: int):
    cache, batch = jaxkv.allocate(
        cache, jnp.zeros(1, jnp.int32), jnp.full(1, tokens, jnp.int32), total_tokens=tokens
    )
    return jaxkv.append(cache, 0, batch, k, k)


def _micro(sample) -> str:
    low, high = (1e6 * value for value in sample.quartiles)
    return f"{1e6 * sample.median:.3g} ({low:.3g}-{high:.3g})"


def sharing() -> tuple[dict, bool]:
    """Three users behind one prompt, with and without `fork`."""
    shared, apart = (_users(fork).physical_pages for fork in (True, False))
    print(f"\nthree users of {', '.join(map(str, USERS))} tokens behind a prompt of {PROMPT}, pages of 16")
    print(f"{shared} pages with the prompt shared, {apart} without: {1 - shared / apart:.0%} saved")
    right = (shared, apart) == (SHARED_PAGES, UNSHARED_PAGES)
    return {"shared_pages": shared, "unshared_pages": apart, "right": right}, right


def _users(share: bool) -> MemoryProfile:
    cache, users = jaxkv.init(small_config(16, 160, 4)), jnp.arange(1, 4)
    prompts = jnp.array([PROMPT, 0, 0, 0] if share else [0, PROMPT, PROMPT, PROMPT])
    cache, batch = _allocate(cache, jnp.arange(4), prompts, total_tokens=4 * PROMPT)
    jaxkv.raise_for_status(batch)
    if share:
        cache, status = _fork(cache, jnp.zeros(3, jnp.int32), users)
        jaxkv.raise_for_status(status)
    cache, batch = _allocate(cache, users, jnp.array(USERS), total_tokens=sum(USERS))
    jaxkv.raise_for_status(batch)
    jaxkv.check_invariants(cache)
    return jax.device_get(_profile(cache))


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables, writes the result, and returns 1 if a figure is not what it must be."""
    parser = argparse.ArgumentParser(description="What memory comes to.")
    parser.add_argument("--quick", action="store_true", help="fewer sequences and rounds; keeps no file")
    options = parser.parse_args(arguments)
    grown, known = growth(), models()
    corrected, corrected_right = corrections()
    wasted, wasted_right = waste(options.quick)
    appended, appended_right = appending(2 if options.quick else ROUNDS)
    saved, saved_right = sharing()
    right = corrected_right and wasted_right and appended_right and saved_right
    document = {
        "growth": grown,
        "models": known,
        "bytes_a_token": corrected,
        "waste": wasted,
        "append": appended,
        "sharing": saved,
        "right": right,
    }
    publish("memory", document, keep=not options.quick)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
