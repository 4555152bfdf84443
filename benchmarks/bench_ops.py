"""What does bookkeeping cost? allocate, fork, free and truncate, beside Levanter's, and as the pool grows.

Each operation is one jitted call with its state donated, timed from the call until every result is
there: dispatch, the operation, and all that it returns (`allocate`'s batch, too). A donated state lives
on in the result: after each run it is brought back, untimed, by the inverse operation. The peer is
treated in the same way, in the same process and the same rounds (see `timing`); only its `free` starts
from a copy, since giving 64 pages to each of its sequences again takes it seconds.

  allocate   each of all sequences, empty before, takes one page
  prefill    one sequence takes 64 pages at once
  fork       one parent of 64 full pages into 64 children, or as many as there are slots for; the peer
             clones one child a call, so its calls are made by a loop inside one jit
  free       all sequences release 64 pages each (`free, 1 page` of one each)
  truncate   all sequences, 64 pages each, release half; the peer has none

The floor is a call that takes a cache, adds one to its counters and returns it: nothing here can be
faster. A pool of one layer, one head and a head_dim of 1 keeps K and V out of it. Against the peer the
free stack is shuffled, so that ids are in no order, as after long use. The growth of the pool is shown
with ids in order, which must meet the target, and again with a shuffled stack: the difference is what the
machine's memory takes for touching as many elements of a larger array.

All of it runs on one core, the peer too, unless `--all-cores`; see `one_core`.

    python -m benchmarks.bench_ops [--quick] [--strict] [--all-cores]

A peer that is not installed is named as absent. The last line of output is one JSON document; unless
`--quick`, it is also written under `results/`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks import peer_levanter
from benchmarks.one_core import keep_to_one_core
from benchmarks.publishing import publish
from jaxkv.tune.timing import Sample, interleave, microseconds, stopwatch, times

PAGE_SIZE, RUN_PAGES = 16, 64
RUN_TOKENS = RUN_PAGES * PAGE_SIZE
TARGETS = {"allocate": 100, "prefill": 20, "free": 10}
GROWTH_TARGET = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of one comparison; `row_pages` is the width of the page table, `scattered` ids are shuffled."""

    num_pages: int
    max_seqs: int
    row_pages: int
    scattered: bool = True

    @property
    def children(self) -> int:
        """Slots that a fork fills."""
        return min(64, self.max_seqs - 1)

    def __str__(self) -> str:
        return f"{self.num_pages:,} pages, {self.max_seqs} sequences, rows of {self.row_pages}"


AGAINST_PEER = [Shape(1024, 16, 64), Shape(8192, 64, 128), Shape(65536, 256, 256)]
GROWTH = [Shape(2**14, 256, 64, scattered=False), Shape(2**20, 256, 64, scattered=False)]
Run = Callable[[], float]


def our_runs(shape: Shape) -> dict[str, Run]:
    """jaxkv's operations, each ready to be timed."""
    allocate = jax.jit(jaxkv.allocate, static_argnames="total_tokens", donate_argnames="cache")
    fork, free, truncate = (
        jax.jit(function, donate_argnames="cache") for function in (jaxkv.fork, jaxkv.free, jaxkv.truncate)
    )
    everyone, parents, first = _int32(range(shape.max_seqs)), _int32([0] * shape.children), _int32([0])
    children = everyone[1 : shape.children + 1]
    one_token, run, half = jnp.ones_like(everyone), _int32([RUN_TOKENS]), RUN_TOKENS // 2

    @partial(jax.jit, static_argnums=1, donate_argnums=0)
    def extend_all(cache, num_tokens):
        def extend(slot, cache):
            return jaxkv.allocate(cache, slot[None], _int32([num_tokens]), total_tokens=num_tokens)[0]

        return jax.lax.fori_loop(0, shape.max_seqs, extend, cache)

    def allocate_all(cache):
        return allocate(cache, everyone, one_token)

    def prefill(cache):
        return allocate(cache, first, run, total_tokens=RUN_TOKENS)

    def free_all(cache):
        return free(cache, everyone)

    fresh = _empty_cache(shape)
    # K and V stay as they are: one pool serves all states, which else are tables and counters.
    pool, empty = fresh.pool, replace(fresh, pool=None)

    def run_of(operation: Callable, restore: Callable, *preparation: Callable) -> Run:
        state = jax.tree.map(jnp.copy, empty)

        def lend_pool(function: Callable) -> float:
            nonlocal pool, state
            seconds, result = stopwatch(function, replace(state, pool=pool))
            cache = _cache_of(result)
            pool, state = cache.pool, replace(cache, pool=None)
            return seconds

        def timed() -> float:
            seconds = lend_pool(operation)
            lend_pool(restore)
            return seconds

        for step in preparation:
            lend_pool(step)
        return timed

    fill = partial(extend_all, num_tokens=RUN_TOKENS)
    return {
        "allocate": run_of(allocate_all, free_all),
        "prefill": run_of(prefill, lambda cache: free(cache, first)),
        "fork": run_of(
            lambda cache: fork(cache, parents, children), lambda cache: free(cache, children), prefill
        ),
        "free": run_of(free_all, fill, fill),
        "free, 1 page": run_of(free_all, allocate_all, allocate_all),
        "truncate": run_of(
            lambda cache: truncate(cache, everyone, jnp.full_like(everyone, half)),
            partial(extend_all, num_tokens=half),
            fill,
        ),
        "floor": run_of(_add_one, _add_one),
    }


def peer_runs(peer: peer_levanter.Peer, shape: Shape) -> dict[str, Run]:
    """The peer's operations, each ready to be timed."""
    they = peer_levanter.Operations(
        peer,
        num_pages=shape.num_pages,
        max_seqs=shape.max_seqs,
        page_size=PAGE_SIZE,
        row_pages=shape.row_pages,
    )
    everyone, whole_run = _int32(range(shape.max_seqs)), _int32(range(RUN_TOKENS))
    all_seqs, all_but_first = jnp.ones(shape.max_seqs, bool), everyone > 0

    def allocate_all(state):
        return they.allocate(state, everyone, jnp.zeros_like(everyone))[0]

    def prefill(state, slot=0):
        return they.allocate(state, jnp.full_like(whole_run, slot), whole_run)[0]

    def free_all(state):
        return they.free(state, all_seqs)

    def run_of(operation: Callable, restore: Callable, state: Any) -> Run:
        def timed() -> float:
            nonlocal state
            seconds, state = stopwatch(operation, state)
            state = jax.block_until_ready(restore(state))
            return seconds

        return timed

    full = _copy(they.empty)
    for slot in range(shape.max_seqs):
        full = prefill(full, slot)
    return {
        "allocate": run_of(allocate_all, free_all, _copy(they.empty)),
        "prefill": run_of(prefill, free_all, _copy(they.empty)),
        "fork": run_of(
            lambda state: they.fork(state, shape.children),
            lambda state: they.free(state, all_but_first),
            prefill(_copy(they.empty)),
        ),
        "free": run_of(free_all, lambda _: _copy(full), _copy(full)),
        "free, 1 page": run_of(free_all, allocate_all, allocate_all(_copy(they.empty))),
    }


def against_peer(peer: peer_levanter.Peer | None, shape: Shape, rounds: int) -> dict[str, Any]:
    """Times one shape, prints its table and returns its numbers."""
    functions = {("jaxkv", name): run for name, run in our_runs(shape).items()}
    if peer:
        functions |= {("levanter", name): run for name, run in peer_runs(peer, shape).items()}
    samples = interleave(functions, rounds=rounds, repeats=3)
    targets = TARGETS if peer and shape == AGAINST_PEER[-1] else {}
    print(f"\n{shape}\n{'':14}{'jaxkv, us':>24}{'levanter, us':>28}{'times faster':>26}{'target':>8}")
    rows = {}
    for name in _operations(samples):
        ours, theirs = samples["jaxkv", name], samples.get(("levanter", name))
        ratio = theirs.over(ours) if theirs else None
        verdict = "" if name not in targets or not ratio else _verdict(ratio.median >= targets[name])
        target = f"{targets[name]}x" if name in targets else ""
        print(
            f"{name:14}{microseconds(ours):>24}{microseconds(theirs) if theirs else '-':>28}"
            f"{times(ratio) if ratio else '-':>26}{target:>8}  {verdict}".rstrip()
        )
        rows[name] = _row(jaxkv=ours, levanter=theirs, ratio=ratio) | {"target": targets.get(name)}
    return {"shape": vars(shape), "seconds": rows}


def growth(rounds: int, *, scattered: bool) -> dict[str, Any]:
    """Times our operations in a small pool and in a large one."""
    small, large = (replace(shape, scattered=scattered) for shape in GROWTH)
    functions = {(shape, name): run for shape in (small, large) for name, run in our_runs(shape).items()}
    samples = interleave(functions, rounds=rounds, repeats=3)
    ids = "shuffled" if scattered else "in order"
    print(f"\nas the pool grows from {small} to {large.num_pages:,} pages, ids {ids}")
    print(f"{'':14}{'small, us':>24}{'large, us':>28}{'times slower':>26}{'target':>8}")
    rows = {}
    for name in _operations(samples):
        before, after = samples[small, name], samples[large, name]
        ratio = after.over(before)
        target = None if scattered or name == "floor" else GROWTH_TARGET
        verdict = f"{target:>7}x  {_verdict(ratio.median <= target)}" if target else ""
        print(f"{name:14}{microseconds(before):>24}{microseconds(after):>28}{times(ratio):>26}{verdict}")
        rows[name] = _row(small=before, large=after, ratio=ratio) | {"target": target}
    return {"shapes": [vars(small), vars(large)], "seconds": rows}


def _empty_cache(shape: Shape) -> jaxkv.KVCache:
    config = jaxkv.CacheConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        num_pages=shape.num_pages,
        page_size=PAGE_SIZE,
        max_seqs=shape.max_seqs,
        max_pages_per_seq=shape.row_pages,
        dtype="float32",
    )
    cache = jaxkv.init(config)
    if not shape.scattered:
        return cache
    shuffled = _int32(np.random.default_rng(0).permutation(shape.num_pages))
    return replace(cache, table=replace(cache.table, free_pages=shuffled))


@partial(jax.jit, donate_argnums=0)
def _add_one(cache: jaxkv.KVCache) -> jaxkv.KVCache:
    return replace(cache, stats=replace(cache.stats, counters=cache.stats.counters + 1))


def _operations(samples: dict[tuple[Any, str], Sample]) -> Iterator[str]:
    return iter(dict.fromkeys(name for _, name in samples))


def _row(**samples: Sample | None) -> dict[str, Any]:
    return {name: sample and sample.as_json() for name, sample in samples.items()}


def _verdict(ok: bool) -> str:
    return "ok" if ok else "MISSED"


def _missed(rows: dict[str, Any], *, at_least: bool) -> list[str]:
    def misses(row):
        return row["ratio"]["median"] < row["target"] if at_least else row["ratio"]["median"] > row["target"]

    return [name for name, row in rows.items() if row["target"] and misses(row)]


def _int32(values) -> jax.Array:
    return jnp.asarray(np.asarray(values), jnp.int32)


def _copy(state: Any) -> Any:
    return jax.block_until_ready(jax.tree.map(jnp.copy, state))


def _cache_of(result: Any) -> jaxkv.KVCache:
    return result if isinstance(result, jaxkv.KVCache) else result[0]


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description="What does bookkeeping cost?")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing kept: a look")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--all-cores", action="store_true", help="let XLA's threads share the operations")
    options = parser.parse_args(arguments)
    one_core = not options.all_cores and keep_to_one_core()
    print(f"on {'one core' if one_core else 'all cores'}")
    try:
        peer = peer_levanter.load()
    except ImportError as error:
        peer = None
        print(f"levanter is absent: {error}")
    rounds = 5 if options.quick else 30
    tables = [against_peer(peer, shape, rounds) for shape in AGAINST_PEER]
    grown = growth(rounds, scattered=False)
    grown_scattered = growth(rounds, scattered=True)
    missed = [f"{name} against levanter" for name in _missed(tables[-1]["seconds"], at_least=True)]
    missed += [f"{name} as the pool grows" for name in _missed(grown["seconds"], at_least=False)]
    print(f"\nbars missed: {', '.join(missed) or 'none'}\n")
    publish(
        "ops",
        {
            "one_core": one_core,
            "levanter": peer.version if peer else None,
            "against_peer": tables,
            "growth": grown,
            "growth_scattered": grown_scattered,
            "bars_missed": missed,
        },
        keep=not options.quick,
    )
    return 1 if options.strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
