"""Which tiles, splits, warps and stages are fastest on this GPU? Writes the table that attention reads.

For each class of shapes the search begins with the rule of `pallas_kernels.paged_attention.triton.tuning` and
changes one value at a time. Every candidate is held to NumPy float64 before it is timed; those that pass
take turns with the best so far on all the problems of the class, and one is taken where it is faster beyond
the spread: the lower quartile of the rounds' ratios (geometric means over the problems) above 1.01.

    python -m benchmarks.tune [--minutes M] [--only PART ...] [--out tuning.toml]
    JAXKV_TUNING=tuning.toml python ...

Without a GPU it says so and rehearses: one small class, the kernels interpreted, nothing is written.

Exit status: 0, or 1 where the rule itself gives a wrong result. The last line of output is one JSON document.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import attention_contestants as contestants
from benchmarks.attention_contestants import HAS_GPU, Contestant
from benchmarks.attention_problems import Problem, build, decode, expected, ragged, uniform, worst_error
from benchmarks.timing import Sample, conditions, interleave, publish, times
from pallas_kernels import formats, use_backend
from pallas_kernels.device import Device
from pallas_kernels.paged_attention.triton import tables, tuning
from pallas_kernels.paged_attention.triton.tables import Shape, Values
from pallas_kernels.paged_attention.triton.tuning import Tuning

ROUNDS = 7 if HAS_GPU else 2
# How many times as fast a candidate must be, at the lower quartile.
WORTH = 1.01
# What is tried in place of a value: these times of it, or these.
TIMES = {"key_tile": (0.5, 2), "query_tile": (0.5, 2), "programs": (0.5, 2)}
INSTEAD = {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
ORDER = "key_tile", "num_warps", "num_stages", "programs", "query_tile"


@dataclass(frozen=True)
class Class:
    """Problems of one `Shape`, which share a row of the table."""

    problems: tuple[Problem, ...]

    @property
    def arguments(self) -> dict:
        """Of `tuning.choose`, for the first of them."""
        problem = self.problems[0]
        q_heads, kv_heads, head_dim = problem.heads
        return dict(
            tokens=sum(problem.queries),
            seqs=len(problem.queries),
            group=q_heads // kv_heads,
            head_dim=head_dim,
            storage=formats.of(problem.stored),
            q_dtype=jnp.dtype(problem.dtype),
        )

    @property
    def shape(self) -> Shape:
        """What the table calls it."""
        return Shape.of(**self.arguments)

    @property
    def name(self) -> str:
        """For people: `decode 128x4, bfloat16`."""
        shape = self.shape
        return f"{self.problems[0].race} {shape.head_dim}x{shape.group}, {shape.pool}, q {shape.dtype}"


def classes() -> list[Class]:
    """Those that matter most come first."""
    if not HAS_GPU:
        return [Class((decode(ragged(2, 20, 40), heads=(4, 2, 16)),))]
    floats = partial(decode, stored="bfloat16", dtype="bfloat16")
    heads = (32, 8, 128), (64, 8, 128), (32, 32, 128), (9, 3, 64), (16, 8, 256)
    found = [_decode(partial(floats, heads=one)) for one in heads[:1]]
    found += [_decode(partial(floats, heads=heads[0], stored=stored)) for stored in ("int8", "uint8")]
    found += [_prefill(heads[0])]
    found += [_decode(partial(floats, heads=one)) for one in heads[1:]]
    found += [_prefill(one) for one in heads[1:]]
    return found


def _decode(problem: Callable[[Sequence[int]], Problem]) -> Class:
    lengths = uniform(64, 8192), uniform(8, 32768), ragged(64, 512, 8192), uniform(1, 32768)
    return Class(tuple(_spread(problem(some)) for some in lengths))


def _prefill(heads: tuple[int, int, int]) -> Class:
    sized = partial(Problem, "prefill", heads=heads, stored="bfloat16", dtype="bfloat16")
    lengths = (2048, 2048), (10240, 2048)
    return Class(tuple(_spread(sized(uniform(1, end), uniform(1, new))) for end, new in lengths))


def _spread(problem: Problem) -> Problem:
    """Over layers that together do not fit an L2 cache."""
    return replace(problem, layers=max(1, min(8, int(2e8 / problem.cost.bytes_accessed))))


def candidates(best: Tuning, name: str) -> list[Tuning]:
    """`best` with another value of one field."""
    value = getattr(best, name)
    others = [int(value * factor) for factor in TIMES.get(name, ())] or list(INSTEAD[name])
    found = []
    for other in others:
        if other != value and other >= (16 if name == "key_tile" else 1):
            found.append(replace(best, **{name: other}))
    return found


class Search:
    """Of one class: its arrays, and who may race."""

    def __init__(self, some: Class):
        self.some = some
        self.arrays = [build(problem) for problem in some.problems]
        self.expected = [expected(*pair) for pair in zip(some.problems, self.arrays, strict=True)]

    @use_backend("triton", interpret=not HAS_GPU)
    def prepare(self, candidate: Tuning) -> list[Contestant] | str:
        """A contestant for each problem, all of them right and compiled, or why not."""
        found = []
        for problem, arrays, want in zip(self.some.problems, self.arrays, self.expected, strict=True):
            try:
                contestant = contestants.jaxkv(
                    problem, arrays, backend="auto", shared_prefix=False, tuning=candidate
                )
                error = worst_error(problem, want, contestant.check())
                contestant.seconds()
            except Exception as reason:  # Whatever the compiler says: too much shared memory, most often.
                return f"{type(reason).__name__}: {str(reason)[:100]!r}"
            if not error <= 1:
                return f"WRONG: {error:.1f} times the tolerance"
            found.append(contestant)
        return found

    def race(self, runners: Mapping[Tuning, list[Contestant]]) -> dict[Tuning, Sample]:
        """Times each problem's; of each candidate the geometric mean, a number a round."""
        by_problem = [
            interleave(
                {candidate: own[nth].seconds for candidate, own in runners.items()}, rounds=ROUNDS, warm_up=1
            )
            for nth in range(len(self.arrays))
        ]
        return {
            candidate: _geometric([samples[candidate] for samples in by_problem]) for candidate in runners
        }


def _geometric(samples: Sequence[Sample]) -> Sample:
    rounds = zip(*(sample.rounds for sample in samples), strict=True)
    return Sample(tuple(prod(values) ** (1 / len(samples)) for values in rounds))


class Found(NamedTuple):
    """What is best for a class.

    Attributes:
      values: what it changes of the rule.
      ratio: how many times as fast as the rule it is.
    """

    values: Values
    ratio: Sample


def search(some: Class, device: Device, deadline: float) -> Found | None:
    """Of one class; None where the rule is wrong."""
    print(f"\n{some.name}", flush=True)
    first = tuning.rule(device, **some.arguments)
    looking, best = Search(some), first
    own = looking.prepare(first)
    if isinstance(own, str):
        print(f"  the rule: {own}")
        return None
    ready = {first: own}
    for name in ORDER:
        # A query tile of one is all there is of one query.
        if time.monotonic() > deadline or (name == "query_tile" and some.shape.queries == "one"):
            continue
        rivals = {}
        for candidate, prepared in _prepare_all(looking, candidates(best, name)).items():
            if isinstance(prepared, str):
                print(f"  {name}={getattr(candidate, name)}: {prepared}", flush=True)
            else:
                rivals[candidate] = prepared
        if not rivals:
            continue
        samples = looking.race({best: ready[best], **rivals})
        ratios = {rival: samples[best].over(samples[rival]) for rival in rivals}
        for rival, ratio in ratios.items():
            print(f"  {name}={getattr(rival, name)}: {times(ratio)}", flush=True)
        fastest = max(ratios, key=lambda rival: ratios[rival].median)
        if ratios[fastest].quartiles[0] > WORTH:
            best, ready[fastest] = fastest, rivals[fastest]
    ratio = Sample((1.0,) * ROUNDS)
    if best != first:
        # Once more, the two alone: what was best of many is flattered.
        samples = looking.race({first: ready[first], best: ready[best]})
        ratio = samples[first].over(samples[best])
        if ratio.quartiles[0] <= WORTH:
            best = first
    values = changed(first, best, device)
    print(f"  taken: {values.given or 'the rule'}, {times(ratio)} as fast as the rule", flush=True)
    return Found(values, ratio)


def _prepare_all(looking: Search, some: Sequence[Tuning]) -> dict[Tuning, list[Contestant] | str]:
    """Of each candidate what `prepare` finds. Most of the time goes into compiling: it is shared out."""
    with ThreadPoolExecutor(max(1, min(len(some), os.cpu_count() or 1))) as pool:
        return dict(zip(some, pool.map(looking.prepare, some), strict=True))


def changed(first: Tuning, best: Tuning, device: Device) -> Values:
    """What of the rule a row of the table changes."""
    found = {name: getattr(best, name) for name in ORDER if getattr(best, name) != getattr(first, name)}
    if "programs" in found:
        found["programs"] = max(1, found["programs"] // device.multiprocessors)
    return Values(**found)


def main(arguments: list[str] | None = None) -> int:
    """Searches, prints and writes the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Finds how paged attention is best cut up on this GPU.")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new afterwards")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="of the classes' names")
    parser.add_argument("--out", type=Path, default=Path("tuning.toml"), help="the table (tuning.toml)")
    options = parser.parse_args(arguments)
    device, kind = Device.current(), jax.devices()[0].device_kind
    chosen = [some for some in classes() if any(part in some.name for part in options.only)]
    if not chosen:
        parser.error(f"no class is called {options.only}")
    print(f"on {kind}, JAX {jax.__version__}; a ratio over 1: faster than the best before it")
    if not HAS_GPU:
        print("There is no GPU here: this is a rehearsal, and no table is written.")
    deadline, table, results, wrong = time.monotonic() + 60 * options.minutes, {}, [], []
    with use_backend("triton", interpret=not HAS_GPU):
        for some in chosen:
            if time.monotonic() > deadline:
                print(f"\n{some.name}: no time left")
                continue
            found = search(some, device, deadline)
            if found is None:
                wrong.append(some.name)
                continue
            given = found.values.given
            results.append({"class": some.name, "values": given, "ratio": found.ratio.as_json()})
            if given:
                table[some.shape] = found.values
    if HAS_GPU:
        now = conditions()
        comment = f"Found by `python -m benchmarks.tune` on {now['date']}, JAX {now['jax']}."
        tables.write(options.out, kind, table, comment)
        print(f"\n{options.out}: {len(table)} of {len(results)} classes better than the rule")
    rows = [{**asdict(shape), **values.given} for shape, values in table.items()]
    publish("tune", {"on_gpu": HAS_GPU, "results": results, "table": rows, "wrong": wrong}, keep=HAS_GPU)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
