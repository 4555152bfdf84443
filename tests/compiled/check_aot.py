"""Is everything done in place on a GPU? Asked of the compiler, with no GPU at hand.

Each program is compiled for an H100 with its cache donated, at the sizes of an 8-billion-parameter
model and a 4 GiB pool, on the `xla` backend and on the `triton` one. (The model itself has all its 32
layers with floats, and the first four with codes; the pool always has 32.) Others have the sizes of Gemma 3
27B and Gemma 4 26B, whose layers are of two kinds, with nothing but the cache in them. Three answers are read
off what the compiler returns:

  temporaries   What the program needs beside its arguments and results. Of this, what the pool may be the
                reason for is at most 2% of the pool.
  copies        Instructions of the optimized HLO that write a new buffer of at least one layer of K. There
                must be none. (A layer of 32 is 1.6% of the pool: the limit above alone would let one
                pass.)
  aliased       Bytes of the results that reuse donated arguments. It must be the whole pool.

Where one of the first two does not hold, the same program is compiled with a pool as small as the page table
allows, everything else the same. Then the difference between the two, scaled to the whole pool, is what the
pool may be the reason for; and copies that the small program has too do not count.

And for the Triton kernels: what a layer of a decode step launches.

Programs that are wrong on purpose run first: if the check passes one of them, it checks nothing.

It needs the CUDA plugin of the same version as JAX (`jax-cuda12-plugin` and `jax-cuda12-pjrt`, or
their successors), and neither a driver nor the CUDA libraries.

    python -m tests.compiled.check_aot [--self-test] [--only NAME ...]

Exit status: 0, or 1 where a program does not run in place, or 2 where the compiler cannot be reached. The
last line of output is one JSON document.
"""

import argparse
import json
import os
import sys
from collections import Counter
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax

from tests.compiled.in_place.judging import LIMIT, Verdict, check, launches_a_layer, mesh
from tests.compiled.in_place.program import POOL_BYTES, Program
from tests.compiled.in_place.programs import programs
from tests.compiled.in_place.wrong import wrong_programs

MIB = 2**20


def table(verdicts: list[Verdict], *, wanted: bool) -> str:
    """The verdicts, a line each; `wanted` is the outcome that is good."""
    header = f"{'program':34}{'compile s':>10}{'temp MiB':>10}{'of the pool<=':>14}{'limit MiB':>10}"
    lines = [f"{header}{'aliased MiB':>13}{'copies':>8}  verdict"]
    for v in verdicts:
        word = {True: "ok", False: "MISSED"}[v.ok] if wanted else {True: "PASSED", False: "caught"}[v.ok]
        lines.append(
            f"{v.program:34}{v.compile_seconds:10.1f}{v.temporary / MIB:10.2f}{v.of_the_pool / MIB:14.2f}"
            f"{LIMIT * v.pool / MIB:10.1f}{v.aliased / MIB:13.1f}{sum(v.copies.values()):8d}  {word}"
        )
        lines += [f"    {times} x {copy}" for copy, times in v.copies.items()]
    return "\n".join(lines)


def check_named(name: str) -> Verdict:
    """Checks the program of this name."""
    print(f"compiling: {name}", file=sys.stderr, flush=True)
    (program,) = (program for program in wrong_programs() + programs() if program.name == name)
    try:
        return check(program)
    except Exception as error:
        error.add_note(f"while {name} was compiled")
        raise


def check_all(chosen: list[Program], compilers: Executor, *, wanted: bool) -> list[Verdict]:
    """Checks programs in other processes, and prints the table."""
    # By name: what a program is made of does not travel to another process.
    verdicts = list(compilers.map(check_named, [program.name for program in chosen]))
    print(table(verdicts, wanted=wanted), flush=True)
    return verdicts


def main(arguments: list[str] | None = None) -> int:
    """Runs the check; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compiled for an H100: is everything done in place?")
    parser.add_argument("--self-test", action="store_true", help="only the programs that must be caught")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="some programs")
    options = parser.parse_args(arguments)
    try:
        device = mesh().devices[0].device_kind
    except Exception as error:
        print(
            f"check_aot: no CUDA compiler ({error}); install jax-cuda12-plugin and jax-cuda12-pjrt "
            f"{jax.__version__} beside JAX",
            file=sys.stderr,
        )
        return 2
    chosen = [p for p in programs() if not options.only or any(name in p.name for name in options.only)]
    if not chosen:
        parser.error(f"no program is called {options.only}")
    print(f"JAX {jax.__version__}, compiled for {device}\n\nmust be caught")
    held, launched = [], Counter()
    # A compiler keeps one core busy, and takes 2 GiB.
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 8), get_context("spawn")) as compilers:
        wrong = check_all(wrong_programs(), compilers, wanted=False)
        if not options.self_test:
            print(f"\nmust hold: at most {LIMIT:.0%} of a {POOL_BYTES / 2**30:g} GiB pool")
            held = check_all(chosen, compilers, wanted=True)
    if held:
        launched = launches_a_layer()
        print("\na layer of a decode step launches, on the triton backend:")
        print("\n".join(f"    {times} x {name}" for name, times in launched.items()))
    missed, uncaught = [v for v in held if not v.ok], [v for v in wrong if v.ok]
    print(
        f"\n{len(held)} programs must hold, {len(missed)} do not; "
        f"of the wrong ones {len(wrong) - len(uncaught)} caught, {len(uncaught)} passed"
    )
    document = {
        "benchmark": "check_aot",
        "jax": jax.__version__,
        "target": device,
        "limit": LIMIT,
        "programs": [asdict(v) | {"ok": v.ok} for v in held],
        "launches_a_layer": dict(launched),
        "self_test": [asdict(v) | {"caught": not v.ok} for v in wrong],
        "passed": not missed and not uncaught,
    }
    print(json.dumps(document))
    return 1 if missed or uncaught else 0


if __name__ == "__main__":
    sys.exit(main())
