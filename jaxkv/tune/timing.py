"""Timing several functions side by side, so that a change in the machine's load affects all of them alike.

What is compared runs in the same process, in rounds. Each round times every function a few times, in an
order that rotates, and keeps the median. A ratio is taken within each round; its median over the rounds is
reported, with the quartiles as its spread.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import jax

from pallas_kernels.paged_attention.triton.tables import file_name

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Sample:
    """Values, one a round: seconds, or ratios of them."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter lies below the first, a quarter above the second."""
        if len(self.rounds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    def over(self, other: "Sample") -> "Sample":
        """The ratio to another sample of the same rounds."""
        return Sample(tuple(a / b for a, b in zip(self.rounds, other.rounds, strict=True)))

    def as_json(self) -> dict[str, float]:
        """Median, quartiles and least value, to four digits, and the number of rounds."""
        low, high = self.quartiles
        values = {"median": self.median, "low": low, "high": high, "least": min(self.rounds)}
        return {name: float(f"{value:.4g}") for name, value in values.items()} | {"rounds": len(self.rounds)}


def stopwatch(function: Callable, *arguments: object) -> tuple[float, Any]:
    """Seconds that a call took until its results were there, and the results."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, result


def of_one_more(seconds: Callable[[int], float], *, few: int, many: int) -> float:
    """Seconds of one call: the difference between a program of many calls and one of few.

    It leaves out what surrounds the calls: the launch, the wait, and attention's schedule, which a model's
    layers share. On an H100 that was some 600 us a program, nearly as long as a call.

    Args:
      seconds: of a program of so many calls, each of which waits for the one before.
      few, many: calls of the two.
    """
    return (seconds(many) - seconds(few)) / (many - few)


def interleave(
    functions: Mapping[Name, Callable[[], float]], *, rounds: int, repeats: int = 1, warm_up: int = 2
) -> dict[Name, Sample]:
    """Times functions in turns.

    Args:
      functions: each does its work once and returns the seconds of the part that counts, so that its
        preparation is not timed.
      rounds: values to collect of each.
      repeats: runs of each a round, whose median is the round's value.
      warm_up: runs of each beforehand (compiling, first touches), not counted.

    Returns:
      A sample of each, in the same rounds.
    """
    for run in functions.values():
        for _ in range(warm_up):
            run()
    names = list(functions)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(statistics.median(functions[name]() for _ in range(repeats)))
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


def microseconds(sample: Sample) -> str:
    """`  71 (66-80)`: the median and the quartiles."""
    low, high = (1e6 * value for value in sample.quartiles)
    return f"{1e6 * sample.median:,.0f} ({low:,.0f}-{high:,.0f})"


def times(sample: Sample) -> str:
    """`12.3x (11.0-13.1)`: a ratio and the quartiles."""
    low, high = sample.quartiles
    return f"{sample.median:.3g}x ({low:.3g}-{high:.3g})"


def machine() -> str:
    """What the device is, for a file's name: `cpu-2-cores`, `nvidia-h100-80gb-hbm3`."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"cpu-{len(os.sched_getaffinity(0))}-cores"
    return file_name(device.device_kind)


def conditions() -> dict[str, object]:
    """Where and when figures were measured."""
    return {
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def publish(benchmark: str, document: Mapping[str, object], folder: Path | None = None) -> None:
    """Prints a result as the last line of output, and writes it to a folder by machine and date."""
    whole = {"benchmark": benchmark, **conditions(), **document}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{benchmark}-{whole['machine']}-{whole['date']}.json"
        path.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))
