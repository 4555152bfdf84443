"""Machine code of every kernel for every GPU it is meant for, with no GPU at hand.

Each kernel is lowered by Pallas for CUDA and for ROCm, compiled by Triton for the targets below, and what
came out is read:

  registers    of a thread.
  spills       bytes (CUDA) or registers (ROCm) that did not fit and went to memory.
  shared       bytes of shared memory of a program.
  matrix       matrix instructions (mma, wgmma, mfma, wmma).
  16-byte      loads of 16 bytes from global memory.
  in flight    CUDA: bytes of K and V being copied for a multiprocessor while it computes: programs resident
               at once, by registers, shared memory and warps, times the copies a program does not wait for.
               A row's padding does not count.

Requirements: no spills anywhere; no more shared memory than a program may have; matrix instructions wherever
attention is computed, and 16-byte loads for at least the whole of a tile of K and of V; 16-byte loads where
pages are copied; at least 40 KB in flight on CUDA in decode with up to 32 query rows a KV head, which is
bound by memory.

Kernels that are wrong on purpose are compiled first: each must miss its requirement.

    python -m tests.compiled.check_targets [--only NAME ...] [--target NAME ...]

It needs the `triton` package. Exit status: 0, or 1 where a requirement is missed. The last line of output is
one JSON document.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import get_context

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.compiled.machine_code.building import Report, build
from tests.compiled.machine_code.kernel import Kernel
from tests.compiled.machine_code.kernels import kernels
from tests.compiled.machine_code.launches import launches
from tests.compiled.machine_code.targets import KIB, TARGETS, Target
from tests.compiled.machine_code.wrong import wrong_kernels

MEASURED = {
    "cuda": {"spills", "matrix", "wide loads", "shared memory", "in flight"},
    "hip": {"spills", "matrix", "wide loads"},
}
COLUMNS = "registers", "spills", "shared", "matrix", "16-byte", "in flight"


def compile_all(
    kernels: list[Kernel], targets: list[Target], compilers: Mapping[str, Executor]
) -> Iterator[Report]:
    """Every kernel for every target, in that order."""
    futures = []
    for kernel in kernels:
        for target in targets:
            if reason := kernel.lacks(target.device):
                print(f"{kernel.name} is left to the xla backend on {target.name}: no {reason}")
                continue
            found = list(launches(kernel, target.device))
            if not found:
                raise RuntimeError(f"{kernel.name} launches none of {kernel.of}")
            futures += [compilers[target.name].submit(build, launch, target) for launch in found]
    print(_line("kernel", "target", *COLUMNS, ""))
    return (future.result() for future in futures)


def show(report: Report, verdict: str) -> None:
    """A line of the table."""
    flight = "-" if report.in_flight is None else f"{report.in_flight // KIB} KB"
    numbers = report.registers, report.spills, report.shared, report.matrix, report.wide_loads, flight
    print(_line(report.kernel, report.target, *numbers, verdict), flush=True)


def caught_and_passed(compilers: Mapping[str, Executor]) -> tuple[int, int]:
    """How many of the wrong kernels were caught, and how many passed; prints a line each."""
    counts = [0, 0]
    for platform in ("cuda", "hip"):
        wrong = [kernel for kernel in wrong_kernels() if kernel.requirements <= MEASURED[platform]]
        one = next(target for target in TARGETS if target.backend == platform)
        for kernel, report in zip(wrong, compile_all(wrong, [one], compilers), strict=True):
            caught = kernel.requirements <= set(report.missed)
            show(report, f"caught: {', '.join(kernel.requirements)}" if caught else "PASSED")
            counts[not caught] += 1
    return counts[0], counts[1]


def main() -> int:
    """Compiles everything, prints the table, and says whether the requirements are met."""
    parser = argparse.ArgumentParser(description="Compiles every kernel for every target.")
    parser.add_argument("--only", nargs="+", default=[""], help="kernels whose name contains one of these")
    parser.add_argument("--target", nargs="+", default=[target.name for target in TARGETS])
    arguments = parser.parse_args()
    chosen = [kernel for kernel in kernels() if any(part in kernel.name for part in arguments.only)]
    targets = [target for target in TARGETS if target.name in arguments.target]
    if not chosen or len(targets) < len(set(arguments.target)):
        parser.error("no such kernel or target")
    reports = []
    with ExitStack() as stack:
        # A process for each target: the AMD compiler keeps some of what it learned of one GPU for the next.
        compilers = {
            target.name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            for target in TARGETS
        }
        print("must be caught")
        caught, passed = caught_and_passed(compilers)
        print("\nmust hold")
        for report in compile_all(chosen, targets, compilers):
            show(report, "MISSED: " + ", ".join(report.missed) if report.missed else "ok")
            reports.append(report)
    missed = [report for report in reports if report.missed]
    print(
        f"\n{len(reports)} compiled, {len(missed)} miss a requirement; "
        f"of the wrong ones {caught} caught, {passed} passed"
    )
    document = {"benchmark": "targets", "reports": [asdict(report) for report in reports]}
    print(json.dumps(document | {"wrong_caught": caught, "wrong_passed": passed}))
    return 1 if missed or passed else 0


def _line(*cells) -> str:
    kernel, target, *numbers, verdict = cells
    return f"{kernel:<26} {target:<8}" + "".join(f"{number!s:>10}" for number in numbers) + f"  {verdict}"


if __name__ == "__main__":
    sys.exit(main())
