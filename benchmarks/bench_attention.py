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
import importlib.util
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks import attention_baselines as baselines
from benchmarks import attention_peers as peers
from benchmarks.attention_baselines import Absent
from benchmarks.publishing import RESULTS, publish
from jaxkv.tune import implementation
from jaxkv.tune.implementation import HAS_GPU, Implementation
from jaxkv.tune.problems import (
    Arrays,
    Problem,
    build,
    decode,
    expected,
    ragged,
    uniform,
    worst_error,
)
from jaxkv.tune.timing import Sample, conditions, interleave, stopwatch, times
from pallas_kernels import cost, formats

OURS, PLAIN = "jaxkv", "jaxkv, sharing nothing"
ROUNDS = 9
MEGABYTE = 1e6
# Times the tokens of bfloat16 that codes of one byte must serve.
CODED_TARGET = 1.7
FASTEST = "FlashAttention-3", "FlashInfer"
VLLM = "vLLM's Triton kernel"
# Targets against these are not missed where they are not installed or not made for a GPU or a shape; but see
# `lacks_judgement`.
MAY_BE_ABSENT = *FASTEST, VLLM

BASELINES: dict[str, Callable[[Problem, Arrays], Implementation]] = {
    "jax.nn.dot_product_attention": baselines.dot_product,
    "dense einsum": partial(baselines.heads_major, transposed=False),
    "dense einsum, K transposed": partial(baselines.heads_major, transposed=True),
    "PyTorch SDPA": baselines.torch_sdpa,
    "JAX's paged attention": baselines.jax_own,
    "cuDNN, contiguous": partial(baselines.dot_product, implementation="cudnn"),
    FASTEST[0]: peers.flash_attention_3,
    FASTEST[1]: peers.flashinfer,
    VLLM: peers.vllm_triton,
}
EINSUMS = "dense einsum", "dense einsum, K transposed"


def problems() -> list[Problem]:
    """All problems that fit the memory."""
    return _for_gpu() if HAS_GPU else _for_cpu()


def _for_cpu() -> list[Problem]:
    prefill = partial(Problem, "prefill", page_size=16)
    shared = partial(Problem, "shared prefix", page_size=16)
    even, uneven = uniform(8, 4096), ragged(8, 128, 4096)
    return [
        decode(even),
        decode(uneven),
        decode(even, page_size=64),
        decode(uneven, page_size=128),
        *(decode(uniform(8, length)) for length in (256, 512, 1024, 2048)),
        decode(uniform(1, 4096)),
        decode(even, heads=(9, 3, 64)),
        decode(uneven, heads=(9, 3, 64)),
        decode(uneven, heads=(8, 1, 128)),
        decode(uneven, stored="int8"),
        decode(uneven, stored="uint8"),
        prefill(uniform(1, 512), uniform(1, 512)),
        prefill(uniform(1, 2560), uniform(1, 512)),
        shared(uniform(8, 2176), uniform(8, 1), shared=2048),
        shared(uniform(32, 2176), uniform(32, 1), shared=2048),
    ]


def _for_gpu() -> list[Problem]:
    """One for each target, then 32/8/128 over every batch and context, the other heads at one of each, and
    what else the kernels do."""
    floats = partial(decode, stored="bfloat16", dtype="bfloat16")
    sized = partial(Problem, stored="bfloat16", dtype="bfloat16")
    even, uneven = uniform(64, 8192), ragged(64, 512, 8192)
    first = [
        floats(even),
        floats(even, stored="int8"),
        floats(uneven),
        sized("prefill", uniform(1, 8192), uniform(1, 8192)),
        floats(even, heads=(64, 8, 128)),
        floats(uniform(8, 32768)),
        floats(even, page_size=64),
        floats(even, stored="uint8"),
        sized("shared prefix", uniform(32, 8320), uniform(32, 1), shared=8192),
        sized("prefill", uniform(1, 10240), uniform(1, 2048)),
        floats(even, heads=(9, 3, 64)),
        floats(even, heads=(32, 32, 128)),
        floats(uniform(1, 32768)),
        floats(uniform(256, 1024)),
    ]
    grid = [
        floats(lengths, page_size=page_size)
        for page_size in (16, 64)
        for seqs in (1, 8, 64, 256)
        for length in (1024, 8192, 32768, 131072)
        for lengths in (uniform(seqs, length), ragged(seqs, length // 16, length))
        if seqs > 1 or lengths == uniform(1, length)
    ]
    grid += [floats(uniform(64, 8192), page_size=page_size) for page_size in (32, 128)]
    grid += [
        floats(uniform(seqs, length), heads=heads)
        for heads in ((8, 1, 128), (32, 32, 128), (64, 8, 128), (9, 3, 64))
        for seqs, length in ((8, 8192), (64, 8192))
    ]
    coded = even, uniform(8, 32768), uneven
    twins = [
        problem
        for problem in grid
        if problem.lengths in coded and (problem.heads, problem.page_size) == ((32, 8, 128), 16)
    ]
    grid += [replace(problem, stored=stored) for stored in ("int8", "uint8") for problem in twins]
    grid += [
        sized("prefill", uniform(1, cached + chunk), uniform(1, chunk))
        for chunk in (512, 2048, 8192)
        for cached in (0, 8192, 32768)
    ]
    grid += [
        sized("shared prefix", uniform(seqs, prefix + 128), uniform(seqs, 1), shared=prefix)
        for seqs in (8, 32, 128)
        for prefix in (2048, 8192, 32768)
    ]
    memory = 9 * 2**30
    return [
        # A layer of a few megabytes is read from the L2 cache unless others come between.
        replace(problem, layers=max(1, min(8, int(200 * MEGABYTE / problem.cost.bytes_accessed))))
        for problem in dict.fromkeys([*first, *grid])
        if problem.cost.bytes_accessed < memory
    ]


def targets_of(problem: Problem) -> dict[str, float]:
    """How many times as fast as each baseline we must be."""
    even = len(set(problem.lengths)) == 1
    if not HAS_GPU:
        if problem.heads != (32, 8, 128) or problem.kind != "decode" or problem.stored != "float32":
            return {PLAIN: 1.0} if problem.kind == "shared prefix" else {}
        if max(problem.lengths) * len(problem.lengths) < 8 * 4096:
            return {}
        einsum = 0.6 if even else 1.2
        return {"jax.nn.dot_product_attention": 3.0 if even else 6.0, **dict.fromkeys(EINSUMS, einsum)}
    if problem.cost.bytes_accessed < 256 * MEGABYTE and problem.kind == "decode":
        return {}
    if problem.kind == "prefill":
        return {"cuDNN, contiguous": 0.6}
    if problem.kind == "shared prefix":
        return {PLAIN: 5.0} if (len(problem.lengths), problem.shared) == (32, 8192) else {}
    targets = {"copy bandwidth": 0.85, VLLM: 1.0}
    if problem.stored != problem.dtype:  # the others take no codes
        return targets
    return {**targets, "JAX's paged attention": 1.0, **dict.fromkeys(FASTEST, 0.95)}


def lacks_judgement(targets: Collection[str], timed: Collection[str], excused: Collection[str]) -> bool:
    """Whether a target was not judged that had to be. Baselines in `excused` may be absent, but one of the
    fastest must have run."""
    unjudged = set(targets) - set(timed)
    return bool(unjudged - set(excused)) or unjudged >= set(FASTEST)


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
    ours = partial(implementation.paged_attention, backend="triton" if HAS_GPU else "xla")
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


def coded_targets(timed: Iterable[Problem], results: Iterable[Mapping]) -> list[dict]:
    """How many times the tokens of bfloat16 we serve from codes: each decode of codes beside its twin."""
    seconds = {
        result["problem"]: row["seconds"]["median"]
        for result in results
        for row in result.get("rows", ())
        if row["name"] == OURS
    }
    rows = []
    for problem in timed:
        twin = replace(problem, stored=problem.dtype)
        judged = HAS_GPU and problem.kind == "decode" and twin.cost.bytes_accessed >= 256 * MEGABYTE
        # What gave a wrong result is missed already.
        if judged and twin != problem and {problem.name, twin.name} <= set(seconds):
            rows.append(_coded_target(problem.name, seconds[twin.name] / seconds[problem.name]))
    return rows


def _coded_target(name: str, ratio: float) -> dict:
    name, met = f"{name}, beside bfloat16", ratio >= CODED_TARGET
    print(f"\n{name}: {ratio:.3g}x the tokens, target {CODED_TARGET} {'met' if met else 'MISSED'}")
    return {"problem": name, "ratio": float(f"{ratio:.4g}"), "target": CODED_TARGET, "met": met}


def copy_seconds(num_bytes: int) -> Callable[[], float]:
    """A device copy that reads and writes so many bytes together."""
    source = jnp.ones(max(1, int(num_bytes) // 4), jnp.bfloat16)

    @partial(jax.jit, static_argnums=0)
    def run(calls, x):
        for _ in range(calls):
            # Adding zero would be taken out; each pass must wait for the one before.
            x = jax.lax.optimization_barrier(x + jnp.bfloat16(1))
        return x

    return lambda: implementation.of_one_call(lambda calls: stopwatch(run, calls, source)[0])


def product_seconds(flops: int, dtype: str) -> Callable[[], float]:
    """The time of so many flops at the rate of a large square matrix product."""
    size = 8192 if HAS_GPU else 1024
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)

    @partial(jax.jit, static_argnums=0)
    def run(calls, a):
        b = a
        for _ in range(calls):
            b = a @ b
        return b

    share = flops / (2 * size**3)
    return lambda: share * implementation.of_one_call(lambda calls: stopwatch(run, calls, a)[0])


def writes() -> list[dict]:
    """Append of 256 tokens and a copy of 256 pages, each beside a device copy of the same bytes."""
    layers, pages, tokens, copies = (32, 1024, 256, 256) if HAS_GPU else (4, 1024, 256, 256)
    backend = "triton" if HAS_GPU else "xla"
    # On a CPU XLA copies a pool of bfloat16 to write to it.
    dtype = jnp.bfloat16 if HAS_GPU else jnp.float32
    pool = jnp.zeros((layers, pages, 8, 16, 128), dtype)
    new = jnp.ones((tokens, 8, 128), dtype)
    page = jax.random.permutation(jax.random.key(0), pages)[:tokens].astype(jnp.int32)
    offset = jnp.arange(tokens, dtype=jnp.int32) % 16
    # Each its own: they are donated.
    state = {"append": (pool + 0, pool + 0), "copy": (pool + 0, pool + 0)}

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def append(calls, k, v):
        for call in range(calls):
            k, v = pallas_kernels.append_kv(
                k, v, new, new, page, offset, layer=call % layers, backend=backend
            )
        return k, v

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def copy(calls, k, v):
        number = jnp.arange(copies, dtype=jnp.int32)
        for _ in range(calls):
            k, v = pallas_kernels.copy_pages(k, v, number, number + pages // 2, backend=backend)
        return k, v

    def ours(name: str, run: Callable) -> Callable[[], float]:
        def seconds(calls: int) -> float:
            spent, state[name] = stopwatch(run, calls, *state[name])
            return spent

        # As a device copy of the same bytes is timed.
        return lambda: implementation.of_one_call(seconds)

    appended = cost.append_kv(tokens=tokens, kv_heads=8, head_dim=128, dtype=dtype, storage=formats.of(dtype))
    copied = cost.copy_pages(copies=copies, layers=layers, page_numbers=8 * 16 * 128, dtype=dtype)
    rows = []
    for name, run, counted in (
        (f"append {tokens} tokens", ours("append", append), appended.bytes_accessed),
        (f"copy {copies} pages, {layers} layers", ours("copy", copy), copied.bytes_accessed),
    ):
        samples = interleave({OURS: run, "copy bandwidth": copy_seconds(counted)}, rounds=ROUNDS)
        ratio, target = samples[OURS].over(samples["copy bandwidth"]), 1.5 if HAS_GPU else None
        met = target is None or ratio.median <= target
        print(
            f"\n{name}: {1e6 * samples[OURS].median:,.0f} us, {times(ratio)} the time of a device copy of "
            f"the same bytes{'' if target is None else f', target {target}: ' + ('met' if met else 'MISSED')}"
        )
        rows.append({"problem": name, "bytes": counted, "ratio_to_copy": ratio.as_json(), "met": met})
    return rows


def plot(results: list[dict]) -> None:
    """Bandwidth by context of decode with even lengths, one line each."""
    if not importlib.util.find_spec("matplotlib"):
        print("no plot: matplotlib is not installed")
        return
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    shape = ", 32/8/128, pages of 16, " + ("bfloat16" if HAS_GPU else "float32")
    largest = {}
    for result in results:
        if found := re.fullmatch(rf"decode (\d+) x (\d+){shape}", result["problem"]):
            seqs, context = map(int, found.groups())
            # Of each context the largest batch.
            largest[context] = max(largest.get(context, (0, None)), (seqs, result), key=lambda pair: pair[0])
    points = defaultdict(list)
    for context, (_, result) in sorted(largest.items()):
        for row in result["rows"]:
            points[row["name"]].append((context, result["bytes"] / row["seconds"]["median"] / 1e9))
    points.pop("matrix rate", None)
    figure, axes = plt.subplots(figsize=(10, 5))
    for name, line in points.items():
        axes.plot(*zip(*line, strict=True), marker="o", linewidth=1, label=name)
    axes.set(
        xscale="log", xlabel="context, tokens", ylabel="GB/s, of the bytes counted", title=f"decode{shape}"
    )
    axes.set_xticks(list(largest), [f"{context:,}" for context in largest])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    # Beside the lines, not over them.
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    now = conditions()
    figure.savefig(RESULTS / f"attention-{now['machine']}-{now['date']}.png", dpi=110)


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
    written = writes() if options.only is None else []
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
