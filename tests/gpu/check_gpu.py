"""The kernels on a real GPU: are they right, do they stay within bounds?

  conformance   Every case of the tests, each backend against NumPy float64, with the memory that the
                outputs will get filled with NaN beforehand; and the operations that write. In float, int8,
                fp8 and int4; with the inputs of the tests, and with fresh ones from a seed.
  text          What SmolLM2 writes in float32, 64 tokens of three texts, beside what a CPU's process writes.
  machine       1,000 operations in random histories, each beside the tests' oracle, in poisoned pages.
  policies      As many under windows and least recently used.
  memcheck      A few cases again under `compute-sanitizer`, where it is installed, and a kernel that it
                must catch.
  racecheck     The same for hazards in shared memory. It sees no races in global memory.

`bench_attention` and `bench_step` say how fast they are. Without a GPU it says so, and rehearses: some of the
cases, the kernels interpreted, and short histories.

    python -m tests.gpu.check_gpu [--only PART ...] [--cases PART ...] [--seed N] [--weights PATH]
        [--jobs N] [--limit SECONDS]

Most of the time goes into compiling: with `--jobs` the parts run beside each other, and the cases in so many
processes. The verdicts are the same.

Exit status: 0, or 1 where a result is wrong. What was not run is named, and is no success. The last line of
output is one JSON document, which a GPU's run of all parts also leaves under `benchmarks/results/`.
"""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

# Some parts are processes of their own, and need memory too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from jaxkv.tune.timing import publish
from tests.gpu.conformance import CASES, HAS_GPU, WRITTEN, conformance, write_conformance
from tests.gpu.running import LATE, Options, judged, module, not_run, outcome

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
OPERATIONS = 1000 if HAS_GPU else 20
MEMCHECKED = (
    *("window over", "rows of no", "71", "prefill and", "samples", "sink tokens over"),
    *("decode of int8, float16", "decode of uint8", "decode of int4", "shared prefix of int8"),
)
# Ours, and those that are wrong on purpose; to check the compiler's as well takes ten times as long.
CHECKED_KERNELS = "attention", "append", "copy_", "move_", "wrong", "race"
# Without a GPU every sixteenth case, and the shapes that compile soonest.
REHEARSED, REHEARSED_SHAPES = 16, ("one sequence",)
REHEARSED_WINDOWS = ("least recently",)


def check_conformance(options: Options) -> dict[str, Any]:
    """The cases with the tests' inputs, and again with fresh ones."""
    if options.jobs > 1 and HAS_GPU:
        return _shared_conformance(options)
    chosen = [case for case in CASES if any(part in case.name for part in options.cases or ("",))]
    chosen = chosen if HAS_GPU or options.cases else chosen[::REHEARSED]
    # Interpreted, each dtype takes half a minute.
    rehearsed = WRITTEN[:1], WRITTEN[-1:]
    failures = []
    seeds = dict(zip((0, options.seed), rehearsed, strict=True))
    failures += conformance(chosen, list(seeds))
    for seed, few in seeds.items():
        failures += write_conformance(WRITTEN if HAS_GPU else few, seed)
    return outcome(
        not failures,
        f"{len(chosen)} cases, seeds 0 and {options.seed}, {len(failures)} wrong",
        failures=failures,
    )


def _shared_conformance(options: Options) -> dict[str, Any]:
    """The same in several processes."""
    seeds = dict.fromkeys((0, options.seed))
    arguments = ["--seed", *map(str, seeds), "--cases", *(options.cases or ("",))]

    def run(nth: int) -> subprocess.CompletedProcess[str]:
        return module(options, "conformance", *arguments, "--share", f"{nth + 1}/{options.jobs}")

    with ThreadPoolExecutor(options.jobs) as pool:
        shares = list(pool.map(run, range(options.jobs)))
    failures, broken, late = [], [], 0
    for done in shares:
        *lines, last = done.stdout.splitlines() or [""]
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
        if last.startswith("{"):
            failures += json.loads(last)["failures"]
            continue
        failures += [line for line in (*lines, last) if line.startswith("WRONG")]
        if done.returncode == LATE:
            late += 1
        else:
            broken.append(f"exit {done.returncode}: {last} {done.stderr[-1000:]}")
    note = f"{options.jobs} processes, seeds 0 and {options.seed}, {len(failures)} wrong"
    note += "".join(f"; one ended with {end}" for end in broken)
    note += f"; {late} not finished in {options.limit:.0f} s" if late else ""
    return judged(not failures and not broken, late > 0, note, failures=failures)


def check_text(options: Options) -> dict[str, Any]:
    """A process with this device, and one that sees only a CPU."""
    # Without a GPU there is but one kind of process.
    platforms = (os.environ.get("JAX_PLATFORMS", ""), "cpu") if HAS_GPU else ("cpu",)

    def write(platform: str) -> subprocess.CompletedProcess[str]:
        environment = {"JAX_PLATFORMS": platform}
        return module(options, "text", "--weights", options.weights, environment=environment)

    written = []
    with ThreadPoolExecutor(len(platforms)) as pool:
        for done in pool.map(write, platforms):
            if done.returncode == LATE:
                return not_run(f"not finished in {options.limit:.0f} s")
            if done.returncode == 2 or "No module named" in done.stderr:
                return not_run(done.stderr.strip().splitlines()[-1])
            if done.returncode:
                return outcome(False, f"exit {done.returncode}: {done.stderr[-2000:]}")
            written.append(json.loads(done.stdout.splitlines()[-1]))
    here, there = written[0]["tokens"], written[-1]["tokens"]
    if not HAS_GPU:
        note = f"{sum(map(len, here))} tokens of a CPU, and no GPU's to hold beside them"
        return {"ran": True, "right": None, "note": note}
    differing = [_first_difference(*pair) for pair in zip(here, there, strict=True)]
    return outcome(
        here == there,
        f"{len(here)} texts, {sum(map(len, here))} tokens; first differences from a CPU's: {differing}",
        platform=written[0]["platform"],
    )


def _first_difference(one: list[int], other: list[int]) -> int | None:
    return next(
        (index for index, pair in enumerate(zip(one, other, strict=True)) if len(set(pair)) > 1), None
    )


def check_machine(
    options: Options, *extra: str, shapes: tuple[str, ...] = REHEARSED_SHAPES
) -> dict[str, Any]:
    """The tests' state machine, in processes of its own; what they print is printed as they end."""
    try:
        from tests.gpu.machines import shapes_of
    except ModuleNotFoundError as error:
        return not_run(str(error))
    names = list(shapes_of("--policies" in extra)) if HAS_GPU and options.jobs > 1 else []
    each = [("--shape", name) for name in names] or [() if HAS_GPU else ("--shapes", *shapes)]
    arguments = ["--operations", str(-(-OPERATIONS // len(each))), "--seed", str(options.seed), *extra]
    counted, broken, late = {}, [], 0
    with ThreadPoolExecutor(len(each)) as pool:
        run = partial(module, options, "machines", *arguments)
        for done in pool.map(lambda chosen: run(*chosen), each):
            print(done.stdout, end="", flush=True)
            lines = done.stdout.splitlines()
            counted |= json.loads(lines[-1])["operations"] if lines and lines[-1].startswith("{") else {}
            if done.returncode == LATE:
                late += 1
            elif done.returncode:
                broken.append(f"exit {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    note = f"{sum(counted.values())} operations in {len(counted)} shapes, seed {options.seed}"
    note += "".join(f"; {end}" for end in broken)
    note += f"; {late} processes not finished in {options.limit:.0f} s" if late else ""
    enough = late > 0 or sum(counted.values()) >= OPERATIONS
    return judged(enough and not broken, late > 0, note, operations=counted)


def check_policies(options: Options) -> dict[str, Any]:
    """The machines of policies whose choice no rounding can change."""
    return check_machine(options, "--policies", shapes=REHEARSED_WINDOWS)


def check_sanitizer(options: Options, tool: str, wrong: str) -> dict[str, Any]:
    """What `compute-sanitizer` says of a few cases, once it has caught a kernel that is wrong on purpose."""
    command = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not HAS_GPU or command is None:
        return not_run("no GPU" if not HAS_GPU else "compute-sanitizer is not installed")
    under = [command, "--tool", tool, "--error-exitcode", "9"]
    for name in CHECKED_KERNELS:
        under += ["--kernel-name", f"kernel_substring={name}"]
    # Each buffer an allocation of its own, to the byte: within one pool of memory nothing would be out of
    # bounds, and `platform` gives out whole pages of it.
    environment = {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"}
    caught = module(options, "wrong", wrong, under=under, environment=environment)
    if caught.returncode != 9:
        note = f"worthless: it does not report the kernel that is wrong on purpose (exit {caught.returncode})"
        return outcome(False, f"{note}: {(caught.stdout + caught.stderr)[-500:]}")
    for what in (("attention", "--cases", *MEMCHECKED), ("writes",)):
        ours = module(options, "conformance", "--only", *what, under=under, environment=environment)
        if ours.returncode == LATE:
            return not_run(f"{what[0]} not finished in {options.limit:.0f} s")
        if ours.returncode:
            output = (ours.stdout + ours.stderr)[-2000:]
            return outcome(False, f"{what[0]}: exit {ours.returncode}: {output}")
    return outcome(True, "clean")


PARTS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "conformance": check_conformance,
    "text": check_text,
    "machine": check_machine,
    "policies": check_policies,
    "memcheck": lambda options: check_sanitizer(options, "memcheck", "bounds"),
    "racecheck": lambda options: check_sanitizer(options, "racecheck", "race"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs all of it; returns the exit status."""
    parser = argparse.ArgumentParser(description="The kernels on a real GPU: right, within bounds?")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--cases", nargs="+", default=[], metavar="PART", help="of the cases' names")
    parser.add_argument("--seed", type=int, help="of the fresh inputs. Default: a new one")
    parser.add_argument("--weights", default="smollm2-135m", help="SmolLM2: a GGUF file or a folder")
    parser.add_argument("--jobs", type=int, default=1, help="processes for the cases, beside the other parts")
    parser.add_argument("--limit", type=float, help="seconds that a process may take")
    given = parser.parse_args(arguments)
    seed = secrets.randbelow(2**31) if given.seed is None else given.seed
    options = Options(seed, given.weights, tuple(given.cases), given.jobs, given.limit)
    if HAS_GPU:
        print(f"on {jax.devices()[0].device_kind}, JAX {jax.__version__}, seed {seed}")
    else:
        print("There is no GPU here, so nothing below was run on one. A rehearsal, kernels interpreted;")
        print(f"seed {seed}")
    start, chosen = time.perf_counter(), given.only or list(PARTS)

    def run(name: str) -> dict[str, Any]:
        began = time.perf_counter()
        result = PARTS[name](options)
        ended = time.perf_counter()
        word = {True: "right", False: "WRONG", None: "-"}[result["right"]]
        print(f"{ended - start:6.0f} s  {name}: {word}: {result['note']}", flush=True)
        return result | {"seconds": round(ended - began, 1)}

    with ThreadPoolExecutor(len(chosen) if options.jobs > 1 else 1) as pool:
        results = dict(zip(chosen, pool.map(run, chosen), strict=True))
    document = {"on_gpu": HAS_GPU, "seed": seed, "parts": results}
    keep = HAS_GPU and given.only is None and not given.cases
    publish("gpu", document, RESULTS if keep else None)
    return 1 if any(result["right"] is False for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
