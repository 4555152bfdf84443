"""Histories of operations on this device, each beside its oracle: the tests' state machines, counted.

Every operation is applied to a poisoned cache and to the plain Python one, and everything that can be read is
compared. Of the policies' machines only those run whose choice no rounding can change: windows, and least
recently used.

    python -m tests.gpu.machines [--policies] [--operations N] [--seed N] [--shapes PART ...]
        [--shape NAME]

Exit status: 0, or 1 where a history goes wrong (Hypothesis prints the shortest it found). The last line of
output is one JSON document: operations by shape.
"""

import argparse
import json
import sys
import time

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from jaxkv.policies import LeastRecentlyUsed, SlidingWindow
from tests.test_policy_machine import SHAPES as POLICY_SHAPES
from tests.test_policy_machine import PolicyMachine
from tests.test_state_machine import SHAPES, Machine

HISTORIES = 4


def run(kind: type[Machine], shape: dict, operations: int, first_seed: int) -> int:
    """Runs histories until so many operations were compared; returns how many were.

    Raises:
      AssertionError: or whatever else a history ends in.
    """
    compared = 0

    class Counted(kind):
        def begin(self):
            twin = super().begin()
            check = twin.check

            def counting(*arguments, **options):
                nonlocal compared
                result = check(*arguments, **options)
                compared += 1
                return result

            twin.check = counting
            return twin

    options = settings(
        max_examples=HISTORIES,
        stateful_step_count=40,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
        phases=[Phase.generate, Phase.shrink],
    )
    number = first_seed
    while compared < operations:
        machine = type("Machine", (Counted,), {"shape": shape})
        run_state_machine_as_test(seed(number)(machine), settings=options)
        number += 1
    return compared


def shapes_of(policies: bool) -> dict[str, dict]:
    """The caches, or those whose policy makes no choice that rounding could change."""
    if not policies:
        return SHAPES
    exact = SlidingWindow, LeastRecentlyUsed
    return {name: shape for name, shape in POLICY_SHAPES.items() if isinstance(shape["policy"], exact)}


def main() -> int:
    """Runs all shapes; returns the exit status."""
    parser = argparse.ArgumentParser(description="The tests' state machines on this device.")
    parser.add_argument("--policies", action="store_true", help="the policies' instead")
    parser.add_argument("--operations", type=int, default=1000, help="of all shapes together, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", nargs="+", metavar="PART", help="of the shapes' names")
    parser.add_argument("--shape", metavar="NAME", help="one of them, by its whole name")
    options = parser.parse_args()
    kind, shapes = PolicyMachine if options.policies else Machine, shapes_of(options.policies)
    if options.shape:
        shapes = {name: shape for name, shape in shapes.items() if name == options.shape}
    if options.shapes:
        shapes = {name: s for name, s in shapes.items() if any(part in name for part in options.shapes)}
    if not shapes:
        parser.error(f"no shape is called {options.shape or options.shapes}")
    start, compared, each = time.perf_counter(), {}, -(-options.operations // len(shapes))
    for name, shape in shapes.items():
        try:
            compared[name] = run(kind, shape, each, options.seed)
        except Exception as error:
            print(f"WRONG: {name}, seed {options.seed}: {type(error).__name__}: {error}", flush=True)
            print("\n".join(getattr(error, "__notes__", ())), flush=True)
            print(json.dumps({"operations": compared, "wrong": name}))
            return 1
        print(f"{time.perf_counter() - start:6.0f} s  {compared[name]:5d} operations: {name}", flush=True)
    print(json.dumps({"operations": compared, "wrong": None}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
