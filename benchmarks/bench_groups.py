"""What do layer groups save, and what do they cost? Memory of models with sliding windows, and bookkeeping.

  memory     pages in use by one sequence of 8,192 and 32,768 tokens: prefilled in chunks of 512, the last 16
             tokens decoded one by one. Beside it what the layers can see (exact), the most pages at any
             later step (a window may begin within a page), how much of "in use" is padding of groups, and
             the pages when every layer keeps every token. Bound: exact, one page per group, and padding.
  sequences  how many sequences of a Gemma-3-27B-shaped model are admitted, one by one, to 40 GiB of
             K and V before the first is refused: all of 8,192 tokens, then seeded lengths, log-uniform from
             200 to 32,000 (about 6,300 on average), 200 to 2,000, and 16,000 to 32,000. In one pool with
             groups; in one pool in which every layer keeps every token; and in two pools, one for each
             kind of layers, with a split that is best for 8,192 tokens. The two pools have no padding of
             groups.
  times      allocate, free and fork of 256 sequences in 65,536 pages with 1, 2 and 7 groups, beside the same
             with one group of full attention, on one core. Target: at most the number of groups.

Pages are counted in caches that are really run. Such a cache has the pages, groups and rows of the model's,
and K and V of one or two elements a token and layer; bytes are pages times the model's bytes of a page.

    python -m benchmarks.bench_groups [--quick] [--strict]

The last line of output is one JSON document; unless `--quick`, it is also written under `results/`.
Exit status: 0, or 1 where a count is out of bounds, or with `--strict` a target is missed.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.one_core import keep_to_one_core
from benchmarks.publishing import publish
from jaxkv.sizing import for_context_length, row_config
from jaxkv.tune.timing import Sample, interleave, microseconds, stopwatch, times

CONTEXTS, CHUNK, DECODED = (8192, 32768), 512, 16
POOL, MAX_SEQS = 40 * 2**30, 128
RANGES = [(200, 32000), (200, 2000), (16000, 32000)]
TIMED_SEQS, TIMED_PAGES, TIMED_TOKENS, TIMED_WINDOW = 256, 65536, 1024, 256
MIB = 2**20


@dataclass(frozen=True)
class Model:
    """The attention layers of a model, one entry for each layer."""

    name: str
    windows: tuple[int | None, ...]
    kv_heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    page_size: int = 16

    def options(self) -> dict[str, Any]:
        """Arguments of `CacheConfig`."""
        return dict(
            num_layers=len(self.windows),
            layer_windows=self.windows,
            layer_kv_heads=self.kv_heads,
            layer_head_dims=self.head_dims,
            page_size=self.page_size,
            max_chunk=CHUNK,
        )

    def without_windows(self) -> "Model":
        """The same, and every layer keeps every token."""
        return replace(self, windows=(None,) * len(self.windows))

    def part(self, *, full: bool) -> "Model":
        """Its layers with full attention alone, or those with a window."""
        kept = [layer for layer, window in enumerate(self.windows) if (window is None) == full]
        windows, heads, dims = (
            tuple(values[layer] for layer in kept) for values in (self.windows, self.kv_heads, self.head_dims)
        )
        return replace(self, windows=windows, kv_heads=heads, head_dims=dims)

    def exact_bytes(self, tokens: int) -> int:
        """bfloat16 K and V of the tokens that each layer can see."""
        layers = zip(self.windows, self.kv_heads, self.head_dims, strict=True)
        return sum(4 * heads * dim * min(tokens, window or tokens) for window, heads, dim in layers)


def pattern(layers: int, every: int, local: Any, full: Any) -> tuple:
    """`local`, and `full` in every so many layers."""
    return tuple(full if layer % every == every - 1 else local for layer in range(layers))


def alike(name: str, layers: int, every: int, window: int, heads: int, dim: int) -> Model:
    """A model whose layers differ in their windows only."""
    return Model(name, pattern(layers, every, window, None), (heads,) * layers, (dim,) * layers)


GEMMA_4 = Model(
    "Gemma 4 26B",
    pattern(30, 6, 1024, None),
    pattern(30, 6, 8, 2),
    pattern(30, 6, 256, 512),
    page_size=32,
)
MODELS = [alike("Gemma 3 1B", 26, 6, 512, 1, 256), GEMMA_4, alike("gpt-oss-20b", 24, 2, 128, 8, 64)]
# MiB of 8,192 tokens in bfloat16, worked out apart from this code.
EXACT_MIB = {"Gemma 3 1B": 43, "Gemma 4 26B": 360, "gpt-oss-20b": 195}
GEMMA_3_27B = alike("Gemma 3 27B", 62, 6, 1024, 16, 128)


def small(config: jaxkv.CacheConfig) -> jaxkv.CacheConfig:
    """The same pages, groups and rows with as few elements as the kinds' page sizes allow."""
    heads = config.layer_kv_heads or (config.num_kv_heads,) * config.num_layers
    dims = config.layer_head_dims or (config.head_dim,) * config.num_layers
    elements = [number * dim for number, dim in zip(heads, dims, strict=True)]
    least = tuple(number // math.gcd(*elements) for number in elements)
    shrunk = replace(
        config, layer_kv_heads=least, layer_head_dims=None, head_dim=1, group_layers=config.pool_shape[0]
    )
    rows = [
        [(group.layers, group.window, group.page_size, group.columns) for group in sizes.groups]
        for sizes in (config, shrunk)
    ]
    assert rows[0] == rows[1], f"{shrunk} has other rows than {config}"
    return shrunk


@partial(jax.jit, donate_argnames="cache")
def admit(cache: jaxkv.KVCache, slot: jax.Array, tokens: jax.Array) -> tuple[jaxkv.KVCache, jax.Array]:
    """Prefills a sequence in chunks and decodes its last tokens; stops where a call is refused."""
    prompt = tokens - DECODED

    def step(state):
        cache, done, _ = state
        count = jnp.where(done < prompt, jnp.minimum(CHUNK, prompt - done), 1)
        cache, batch = jaxkv.allocate(cache, slot[None], count[None], total_tokens=CHUNK)
        return cache, done + count, batch.status[0]

    def goes_on(state):
        _, done, status = state
        return (done < tokens) & (status == jaxkv.Status.OK)

    cache, _, status = jax.lax.while_loop(goes_on, step, (cache, jnp.int32(0), jnp.int32(jaxkv.Status.OK)))
    return cache, status


def pages_of_groups(model: Model, context: int) -> tuple[jaxkv.CacheConfig, list[int]]:
    """The config of one sequence, and the pages in use in each group after it has run."""
    config = for_context_length(context, max_seqs=1, **model.options())
    cache, status = admit(jaxkv.init(small(config)), jnp.int32(0), jnp.int32(context))
    assert status == jaxkv.Status.OK and cache.table.positions[0] == context
    jaxkv.check_invariants(cache)
    lengths = np.asarray(cache.table.lengths)
    pages = [-(-int(stored) // group.page_size) for stored, group in zip(lengths, config.groups, strict=True)]
    assert sum(pages) == config.num_pages - int(cache.table.num_free)
    return config, pages


def memory_of(model: Model, context: int) -> dict[str, Any]:
    """Bytes in use by one sequence, with what they are made of."""
    config, pages = pages_of_groups(model, context)
    before_config, before = pages_of_groups(model.without_windows(), context)
    layers_per_page = config.pool_shape[0]
    of_layer = config.page_bytes // layers_per_page
    used = sum(pages) * config.page_bytes
    padding = sum(
        count * of_layer * (layers_per_page - len(group.layers))
        for count, group in zip(pages, config.groups, strict=True)
    )
    exact = model.exact_bytes(context)
    one_page_each = of_layer * sum(len(group.layers) for group in config.groups)
    right = exact <= used - padding <= exact + one_page_each
    right &= used <= config.pages_for_seq(context) * config.page_bytes
    if context == CONTEXTS[0]:
        right &= exact == EXACT_MIB[model.name] * MIB
    return {
        "model": model.name,
        "tokens": context,
        "groups": len(config.groups),
        "layers_per_page": layers_per_page,
        "exact": exact,
        "used": used,
        "most": config.pages_for_seq(context) * config.page_bytes,
        "padding": padding,
        "every_token": sum(before) * before_config.page_bytes,
        "right": right,
    }


def memory() -> list[dict[str, Any]]:
    """Bytes in use by model and context."""
    print("MiB of K and V in use by one sequence, bfloat16")
    print(
        f"{'model':<14}{'tokens':>8}{'groups':>8}{'exact':>10}{'in use':>10}{'at most':>10}"
        f"{'padding':>10}{'every token':>13}{'saved':>8}"
    )
    rows = [memory_of(model, context) for model in MODELS for context in CONTEXTS]
    for row in rows:
        sizes = [f"{row[name] / MIB:,.1f}" for name in ("exact", "used", "most", "padding", "every_token")]
        print(
            f"{row['model']:<14}{row['tokens']:>8,}{row['groups']:>8}{sizes[0]:>10}{sizes[1]:>10}"
            f"{sizes[2]:>10}{sizes[3]:>10}{sizes[4]:>13}{1 - row['used'] / row['every_token']:>8.0%}"
            f"{'' if row['right'] else '  OUT OF BOUNDS'}"
        )
    return rows


def pool_of(model: Model, context: int, num_bytes: int) -> jaxkv.CacheConfig:
    """A cache with as many pages as fit, for sequences of up to `context` tokens."""
    row = row_config(context, max_seqs=MAX_SEQS, **model.options())
    return replace(row, num_pages=num_bytes // row.page_bytes)


def split_pools(model: Model, context: int, num_bytes: int) -> list[jaxkv.CacheConfig]:
    """A pool for each kind of layers, split as the most sequences of 8,192 tokens need it."""
    tokens = CONTEXTS[0]
    parts = [model.part(full=full) for full in (True, False)]
    rows = [pool_of(part, context, num_bytes) for part in parts]
    each = [row.pages_for_seq(tokens) * row.page_bytes for row in rows]
    chunk = [row.pages_for_chunk(tokens) * row.page_bytes for row in rows]
    most = (num_bytes - sum(chunk)) // sum(each)
    needs = [most * seq + more for seq, more in zip(each, chunk, strict=True)]
    return [
        pool_of(part, context, num_bytes * need // sum(needs))
        for part, need in zip(parts, needs, strict=True)
    ]


def admitted(configs: Sequence[jaxkv.CacheConfig], lengths: Sequence[int]) -> int:
    """Sequences admitted before the first that any of the pools refuses."""
    caches = [jaxkv.init(small(config)) for config in configs]
    for slot, length in enumerate(lengths):
        results = [admit(cache, jnp.int32(slot), jnp.int32(length)) for cache in caches]
        caches = [cache for cache, _ in results]
        if any(status != jaxkv.Status.OK for _, status in results):
            return slot
    raise AssertionError(f"{len(lengths)} sequences do not fill the pool")


def sequences(seeds: int) -> dict[str, Any]:
    """How many sequences run at once, by design and lengths."""

    def designs(context: int) -> dict[str, list[jaxkv.CacheConfig]]:
        return {
            "one pool, groups": [pool_of(GEMMA_3_27B, context, POOL)],
            "one pool, every layer keeps every token": [
                pool_of(GEMMA_3_27B.without_windows(), context, POOL)
            ],
            "a pool for each kind, split for 8,192": split_pools(GEMMA_3_27B, context, POOL),
        }

    equal = {name: admitted(of, [CONTEXTS[0]] * MAX_SEQS) for name, of in designs(CONTEXTS[0]).items()}
    mixed = {
        name: {
            f"{least:,} to {most:,}": [admitted(of, trace(seed, least, most)) for seed in range(seeds)]
            for least, most in RANGES
        }
        for name, of in designs(CONTEXTS[1]).items()
    }
    print(f"\nsequences of {GEMMA_3_27B.name} at once in {POOL // 2**30} GiB of K and V, bfloat16")
    ranges = [f"{least:,} to {most:,}" for least, most in RANGES]
    print(f"{f'tokens; mean of {seeds} seeds':<42}{'8,192':>8}" + "".join(f"{name:>18}" for name in ranges))
    for name, count in equal.items():
        means = "".join(f"{np.mean(counts):>18.1f}" for counts in mixed[name].values())
        print(f"{name:<42}{count:>8}{means}")
    return {"pool_bytes": POOL, "tokens_8192": equal, "mixed": mixed}


def trace(seed: int, least: int, most: int) -> list[int]:
    """Log-uniform lengths of sequences in the order in which they arrive."""
    logs = np.random.default_rng(seed).uniform(np.log(least), np.log(most), MAX_SEQS)
    return np.exp(logs).astype(int).tolist()


# Windows of one layer each, so as many groups; the first is the baseline.
TIMED = {
    "1 full": (None,),
    "1 window": (TIMED_WINDOW,),
    "2": (None, TIMED_WINDOW),
    "7": (None, *(TIMED_WINDOW,) * 6),
}
TARGETS = {"2": 2, "7": 7}


def runs(windows: tuple[int | None, ...]) -> dict[str, Callable[[], float]]:
    """Operations on all sequences, each ready to be timed on a copy of a filled cache."""
    config = jaxkv.CacheConfig(
        num_layers=len(windows),
        num_kv_heads=1,
        head_dim=1,
        num_pages=TIMED_PAGES,
        max_seqs=TIMED_SEQS,
        max_pages_per_seq=2 * TIMED_TOKENS // 16,
        dtype="float32",
        layer_windows=windows,
        group_layers=1,
        max_chunk=CHUNK,
    )
    assert len(config.groups) == len(windows)
    half, full = filled(config, TIMED_SEQS // 2), filled(config, TIMED_SEQS)
    everyone = jnp.arange(TIMED_SEQS, dtype=jnp.int32)
    allocate, fork, free = (
        jax.jit(function, donate_argnames="cache") for function in (jaxkv.allocate, jaxkv.fork, jaxkv.free)
    )

    def run_of(operation: Callable, before: jaxkv.KVCache) -> Callable[[], float]:
        def timed() -> float:
            return stopwatch(operation, jax.block_until_ready(jax.tree.map(jnp.copy, before)))[0]

        return timed

    parents, children = jnp.split(everyone, 2)
    return {
        # A sequence has whole pages, so that each takes a page in each group; windows release one.
        "allocate": run_of(lambda cache: allocate(cache, everyone, jnp.ones_like(everyone)), full),
        "free": run_of(lambda cache: free(cache, everyone), full),
        "fork": run_of(lambda cache: fork(cache, parents, children), half),
    }


def filled(config: jaxkv.CacheConfig, num_seqs: int) -> jaxkv.KVCache:
    """A cache whose first sequences have `TIMED_TOKENS` tokens each."""
    cache = jaxkv.init(config)
    for slot in range(num_seqs):
        cache, status = admit(cache, jnp.int32(slot), jnp.int32(TIMED_TOKENS))
        assert status == jaxkv.Status.OK
    return cache


def bookkeeping(rounds: int) -> tuple[dict[str, Any], list[str]]:
    """Times by number of groups, and the targets missed."""
    functions = {
        (groups, name): run for groups, windows in TIMED.items() for name, run in runs(windows).items()
    }
    samples = interleave(functions, rounds=rounds, repeats=3)
    sizes = f"{TIMED_SEQS} sequences of {TIMED_TOKENS:,} tokens, {TIMED_PAGES:,} pages"
    print(f"\n{sizes}, windows of {TIMED_WINDOW}")
    print(f"{'':10}{'groups':>10}{'us':>24}{'of one full group':>26}{'target':>8}")
    rows, missed = {}, []
    for name in dict.fromkeys(name for _, name in samples):
        base = samples["1 full", name]
        for groups in TIMED:
            sample = samples[groups, name]
            ratio, target = sample.over(base), TARGETS.get(groups)
            if target is not None and ratio.median > target:
                missed.append(f"{name}, {groups} groups")
            print(_line(name, groups, sample, ratio, target))
            rows[f"{name}, {groups}"] = dict(seconds=sample.as_json(), ratio=ratio.as_json(), target=target)
    print(f"\ntargets missed: {'; '.join(missed) or 'none'}\n")
    return rows, missed


def _line(name: str, groups: str, sample: Sample, ratio: Sample, target: int | None) -> str:
    verdict = "" if target is None else f"{target:>7}x  {'ok' if ratio.median <= target else 'MISSED'}"
    return f"{name:10}{groups:>10}{microseconds(sample):>24}{times(ratio):>26}{verdict}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables, writes the result, and returns the exit status."""
    parser = argparse.ArgumentParser(description="What do layer groups save, and what do they cost?")
    parser.add_argument("--quick", action="store_true", help="few seeds and rounds; keeps no file")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a target is missed")
    options = parser.parse_args(arguments)
    one_core = keep_to_one_core()
    used = memory()
    at_once = sequences(1 if options.quick else 10)
    seconds, missed = bookkeeping(3 if options.quick else 30)
    right = all(row["right"] for row in used)
    document = {
        "memory": used,
        "sequences": at_once,
        "times": seconds,
        "one_core": one_core,
        "targets_missed": missed,
        "right": right,
    }
    publish("groups", document, keep=not options.quick)
    return 1 if not right or (options.strict and missed) else 0


if __name__ == "__main__":
    raise SystemExit(main())
