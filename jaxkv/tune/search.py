"""The search of one class: one value of the tuning at a time, taken where it is faster beyond the spread."""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import NamedTuple

from jaxkv.tune.classes import Class
from jaxkv.tune.implementation import HAS_GPU, Implementation, paged_attention
from jaxkv.tune.problems import build, expected, worst_error
from jaxkv.tune.timing import Sample, interleave, times
from pallas_kernels import use_backend
from pallas_kernels.device import Device
from pallas_kernels.paged_attention.triton import tuning
from pallas_kernels.paged_attention.triton.tables import Values
from pallas_kernels.paged_attention.triton.tuning import Tuning

ROUNDS = 7 if HAS_GPU else 2
# How many times as fast a candidate must be, at the lower quartile.
WORTH = 1.01
# What is tried in place of a value: these times of it, or these.
TIMES = {"key_tile": (0.5, 2), "query_tile": (0.5, 2), "programs": (0.5, 2)}
INSTEAD = {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
ORDER = "key_tile", "num_warps", "num_stages", "programs", "query_tile"


class Found(NamedTuple):
    """What is best for a class.

    Attributes:
      values: what it changes of the rule.
      ratio: how many times as fast as the rule it is.
    """

    values: Values
    ratio: Sample


def search(some: Class, device: Device, deadline: float) -> Found | None:
    """Finds what is best for a class; None where the rule gives a wrong result."""
    print(f"\n{some.name}", flush=True)
    first = tuning.rule(device, **some.arguments)
    trials = Trials(some)
    prepared = trials.prepare(first)
    if isinstance(prepared, str):
        print(f"  the rule: {prepared}")
        return None
    best, ready = first, {first: prepared}
    for name in ORDER:
        # A query tile of one is all there is of one query.
        if time.monotonic() < deadline and not (name == "query_tile" and some.shape.queries == "one"):
            best = _improve(name, trials, best, ready)
    ratio = Sample((1.0,) * ROUNDS)
    if best != first:
        # Once more, these two alone: the best of many looks better than it is.
        samples = trials.compare({first: ready[first], best: ready[best]})
        ratio = samples[first].over(samples[best])
        if ratio.quartiles[0] <= WORTH:
            best = first
    values = changed(first, best, device)
    print(f"  taken: {values.given or 'the rule'}, {times(ratio)} as fast as the rule", flush=True)
    return Found(values, ratio)


class Trials:
    """Checks and times candidates on the problems of one class."""

    def __init__(self, some: Class):
        self.some = some
        self.arrays = [build(problem) for problem in some.problems]
        self.expected = [expected(*pair) for pair in zip(some.problems, self.arrays, strict=True)]

    @use_backend("triton", interpret=not HAS_GPU)
    def prepare(self, candidate: Tuning) -> list[Implementation] | str:
        """An implementation for each problem, all of them right and compiled, or why not."""
        found = []
        for problem, arrays, want in zip(self.some.problems, self.arrays, self.expected, strict=True):
            try:
                one = paged_attention(problem, arrays, backend="auto", shared_prefix=False, tuning=candidate)
                error = worst_error(problem, want, one.check())
                one.seconds()
            except Exception as reason:  # Whatever the compiler says: too much shared memory, most often.
                return f"{type(reason).__name__}: {str(reason)[:100]!r}"
            if not error <= 1:
                return f"WRONG: {error:.1f} times the tolerance"
            found.append(one)
        return found

    def prepare_all(self, candidates: Sequence[Tuning]) -> dict[Tuning, list[Implementation] | str]:
        """`prepare` of each candidate, in threads: most of the time goes into compiling."""
        with ThreadPoolExecutor(max(1, min(len(candidates), os.cpu_count() or 1))) as pool:
            return dict(zip(candidates, pool.map(self.prepare, candidates), strict=True))

    def compare(self, ready: Mapping[Tuning, list[Implementation]]) -> dict[Tuning, Sample]:
        """Times each problem; of each candidate the geometric mean over the problems, a value a round."""
        by_problem = [
            interleave(
                {candidate: own[nth].seconds for candidate, own in ready.items()}, rounds=ROUNDS, warm_up=1
            )
            for nth in range(len(self.arrays))
        ]
        return {candidate: _geometric([samples[candidate] for samples in by_problem]) for candidate in ready}


def _improve(name: str, trials: Trials, best: Tuning, ready: dict[Tuning, list[Implementation]]) -> Tuning:
    """The best of `best` and other values of one field; what was prepared joins `ready`."""
    tried = {}
    for candidate, prepared in trials.prepare_all(candidates(best, name)).items():
        if isinstance(prepared, str):
            print(f"  {name}={getattr(candidate, name)}: {prepared}", flush=True)
        else:
            tried[candidate] = prepared
    if not tried:
        return best
    samples = trials.compare({best: ready[best], **tried})
    ratios = {candidate: samples[best].over(samples[candidate]) for candidate in tried}
    for candidate, ratio in ratios.items():
        print(f"  {name}={getattr(candidate, name)}: {times(ratio)}", flush=True)
    fastest = max(ratios, key=lambda candidate: ratios[candidate].median)
    if ratios[fastest].quartiles[0] <= WORTH:
        return best
    ready[fastest] = tried[fastest]
    return fastest


def candidates(best: Tuning, name: str) -> list[Tuning]:
    """`best` with another value of one field."""
    value = getattr(best, name)
    others = [int(value * factor) for factor in TIMES.get(name, ())] or list(INSTEAD[name])
    least = 16 if name == "key_tile" else 1
    return [replace(best, **{name: other}) for other in others if other != value and other >= least]


def changed(first: Tuning, best: Tuning, device: Device) -> Values:
    """What of the rule a row of the table changes."""
    found = {name: getattr(best, name) for name in ORDER if getattr(best, name) != getattr(first, name)}
    if "programs" in found:
        found["programs"] = max(1, found["programs"] // device.multiprocessors)
    return Values(**found)


def _geometric(samples: Sequence[Sample]) -> Sample:
    rounds = zip(*(sample.rounds for sample in samples), strict=True)
    return Sample(tuple(prod(values) ** (1 / len(samples)) for values in rounds))
