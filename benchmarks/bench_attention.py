"""Attention, append and page copy beside every other library that can do it, in one run.

    python -m benchmarks.bench_attention [--only PART ...] [--without NAME ...] [--minutes M]

Every implementation is compared with NumPy float64 first (in the first, the longest and the last sequence of
a batch, their last 16 queries), and is timed in turns with the others. A time is that of one layer; on a GPU,
of ten more passes over the layers in one program (for PyTorch in one CUDA graph), each call waiting for the
one before, over layers that together do not fit the L2 cache. `roofline` is the time that the counted
bytes would take at the copy bandwidth of the same run, or the counted flops at its rate of matrix products,
whichever is longer.

On a CPU the `xla` backend is compared with dense caches of the same contents, padded as they must be. Without
a GPU nothing here says anything of one. The most informative problems come first, for a GPU that is there for
minutes only.

Exit status: 0, or 1 where a result is wrong or a target is missed. A target against a baseline that is not
installed, or not made for this GPU or shape, is not judged; but FlashAttention-3 or FlashInfer must have run.
The last line of output is one JSON document, which `benchmarks/results/` keeps, with a plot of bandwidth by
context where matplotlib is installed.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import jax

from benchmarks import attention_baselines as baselines
from benchmarks import attention_peers as peers
from benchmarks.attention_baselines import Absent
from benchmarks.attention_plot import plot
from benchmarks.attention_problems import problems
from benchmarks.attention_targets import (
    EINSUMS,
    FASTEST,
    MAY_BE_ABSENT,
    OURS,
    PLAIN,
    VLLM,
    coded_targets,
    lacks_judgement,
    targets_of,
)
from benchmarks.attention_writes import copy_seconds, product_seconds, writes
from benchmarks.publishing import publish
from jaxkv.tune.implementation import HAS_GPU, Implementation, paged_attention
from jaxkv.tune.problems import Arrays, Problem, build, expected, worst_error
from jaxkv.tune.timing import Sample, interleave, times

ROUNDS = 9
BASELINES: dict[str, Callable[[Problem, Arrays], Implementation]] = {
    "jax.nn.dot_product_attention": baselines.dot_product,
    EINSUMS[0]: partial(baselines.heads_major, transposed=False),
    EINSUMS[1]: partial(baselines.heads_major, transposed=True),
    "PyTorch SDPA": baselines.torch_sdpa,
    "JAX's paged attention": baselines.jax_own,
    "cuDNN, contiguous": partial(baselines.dot_product, implementation="cudnn"),
    FASTEST[0]: peers.flash_attention_3,
    FASTEST[1]: peers.flashinfer,
    VLLM: peers.vllm_triton,
}


def compare(problem: Problem, without: Collection[str] = ()) -> dict:
    """Checks and times every implementation; prints a line each."""
    print(f"\n{problem.name}", flush=True)
    arrays = build(problem)
    functions, errors, absent, excused = checked(problem, arrays, without)
    if OURS not in functions:
        return {"problem": problem.name, "errors_of_tolerance": errors, "absent": absent, "met": False}
    functions["copy bandwidth"] = copy_seconds(problem.cost.bytes_accessed)
    functions["matrix rate"] = product_seconds(problem.cost.flops, problem.dtype)
    samples = interleave(functions, rounds=ROUNDS, warm_up=1)
    roofline = max(samples["copy bandwidth"].median, samples["matrix rate"].median)
    targets = targets_of(problem)
    unjudged = sorted(set(targets) - set(samples))
    for name in unjudged:
        print(f"  {name:<30} target {targets[name]:g} NOT JUDGED")
    rows = [_row(name, problem, sample, samples[OURS], targets.get(name)) for name, sample in samples.items()]
    for name, reason in absent.items():
        print(f"  {name:<30} absent: {reason}")
    print(f"  {'roofline':<30}{1e6 * roofline:>11,.0f} us")
    return {
        "problem": problem.name,
        "bytes": problem.cost.bytes_accessed,
        "flops": problem.cost.flops,
        "roofline_seconds": roofline,
        "errors_of_tolerance": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "absent": absent,
        "unjudged": unjudged,
        "rows": rows,
        "met": all(row["met"] for row in rows) and not lacks_judgement(targets, samples, excused),
    }


class Checked(NamedTuple):
    """What was compared with float64, by name.

    Attributes:
      functions: seconds of one layer, of those that are right.
      errors: in units of the tolerance.
      absent: those that did not run, and why.
      excused: of these, the ones that may be absent.
    """

    functions: dict[str, Callable[[], float]]
    errors: dict[str, float]
    absent: dict[str, str]
    excused: set[str]


def checked(problem: Problem, arrays: Arrays, without: Collection[str]) -> Checked:
    """Compares every implementation with NumPy float64."""
    ours = partial(paged_attention, backend="triton" if HAS_GPU else "xla")
    all_of_them = {OURS: ours, **BASELINES}
    if problem.kind == "shared prefix":
        all_of_them[PLAIN] = partial(ours, shared_prefix=False)
    want, found = expected(problem, arrays), Checked({}, {}, {}, set())
    for name, prepare in all_of_them.items():
        try:
            if name in without:
                raise Absent("left out")
            one = prepare(problem, arrays)
            error = worst_error(problem, want, one.check())
        except Absent as reason:
            found.absent[name] = str(reason)
            found.excused.update({name} & set(MAY_BE_ABSENT))
        except Exception as error:  # A baseline that breaks is no reason to stop the others.
            if name in (OURS, PLAIN):
                raise
            found.absent[name] = f"{type(error).__name__}: {str(error)[:120]!r}"
        else:
            found.errors[name] = error
            if error <= 1:
                found.functions[name] = one.seconds
            else:
                print(f"  {name:<30} WRONG: {error:.1f} times the tolerance, not timed")
    return found


def _row(name: str, problem: Problem, sample: Sample, ours: Sample, target: float | None) -> dict:
    seconds, ratio = sample.median, sample.over(ours)
    met = target is None or ratio.median >= target
    verdict = "" if target is None else f"   target {target:g} {'met' if met else 'MISSED'}"
    rate = f"{problem.cost.bytes_accessed / seconds / 1e9:>9,.1f} GB/s"
    if problem.kind == "prefill":
        rate = f"{problem.cost.flops / seconds / 1e9:>8,.0f} GFLOP/s"
    against = "" if name == OURS else f"   we are {times(ratio)}"
    print(f"  {name:<30}{1e6 * seconds:>11,.0f} us {rate}{against}{verdict}", flush=True)
    return {
        "name": name,
        "seconds": sample.as_json(),
        "ratio": ratio.as_json(),
        "target": target,
        "met": met,
    }


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description="Attention beside every other library that can do it.")
    parser.add_argument("--only", nargs="+", metavar="PART", help="of the problems' names")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="implementations left out")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new afterwards")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"on {device.device_kind}, JAX {jax.__version__}; a ratio over 1: we are faster")
    if not HAS_GPU:
        print("There is no GPU here: nothing below was run on one.")
    if unknown := sorted({*options.without} - {OURS, PLAIN, *BASELINES}):
        parser.error(f"no implementation is called {unknown[0]!r}")
    chosen = [
        problem
        for problem in problems()
        if options.only is None or any(part in problem.name for part in options.only)
    ]
    deadline, results, not_run = time.monotonic() + 60 * options.minutes, [], []
    written = writes(ROUNDS) if options.only is None else []
    for problem in chosen:
        if time.monotonic() > deadline:
            not_run.append(problem.name)
        else:
            results.append(compare(problem, options.without))
    results += coded_targets(chosen, results) + written
    if not_run:
        print(f"\nno time left for {len(not_run)} of {len(chosen)} problems")
    if options.only is None:
        plot(results)
    document = {"on_gpu": HAS_GPU, "results": results, "not_run": not_run}
    publish("attention", document, keep=options.only is None)
    missed = [result["problem"] for result in results if not result["met"]]
    for name in missed:
        print(f"missed: {name}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
