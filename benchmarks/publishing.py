"""Where the benchmarks keep their results."""

from collections.abc import Mapping
from pathlib import Path

from jaxkv.tune import timing

RESULTS = Path(__file__).with_name("results")


def publish(benchmark: str, document: Mapping[str, object], *, keep: bool = True) -> None:
    """Prints a result as the last line of output; to keep it, writes it under `results/`."""
    timing.publish(benchmark, document, RESULTS if keep else None)
