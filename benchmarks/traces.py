"""Where the device time of a compiled program went: the profiler's trace, read with the program's own text.

JAX's profiler writes each kernel that ran, with the HLO instruction it belongs to. The optimized HLO says of
each instruction which scopes it was traced in (`op_name`), and jaxkv's operations are scopes:
`jaxkv.allocate`, `jaxkv.append`, `jaxkv.attend`. So no kernel's name has to be guessed at. What cannot be
traced back to an instruction is reported as such.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxkv.hlo import Kernels

SCOPE = "jaxkv."
REST, COMPILER = "rest", "compiler"


class Event(NamedTuple):
    """One piece of work on a device, without the pieces inside it.

    Attributes:
      name: of the kernel, or of the copy.
      hlo_op: the instruction it belongs to, where the profiler says so.
      hlo_module: and its module.
      seconds: that it took, less those of events inside it.
    """

    name: str
    hlo_op: str | None
    hlo_module: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Division:
    """Device seconds of a program by part.

    Attributes:
      parts: by scope, `rest` for instructions outside of all of them, `compiler` for those that it put in.
      mixed: of fusions that hold instructions of several parts; they count where their result belongs.
      unnamed: of events that belong to no instruction of the program.
    """

    parts: Mapping[str, float]
    mixed: float
    unnamed: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts.values()) + self.unnamed

    def share(self, part: str) -> float:
        """Of the total."""
        return self.parts.get(part, 0.0) / self.total if self.total else 0.0

    @property
    def unnamed_share(self) -> float:
        """Of the total."""
        return self.unnamed / self.total if self.total else 1.0


def read_trace(folder: str | Path) -> list[Event]:
    """Device events of the newest `.trace.json.gz` that `jax.profiler.trace(folder)` left.

    Raises:
      FileNotFoundError: if there is none.
    """
    files = sorted(Path(folder).rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder}: the profiler left no .trace.json.gz")
    with gzip.open(files[-1], "rt") as file:
        return device_events(json.load(file)["traceEvents"])


def device_events(events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """What ran on a GPU's streams; without a GPU, what the CPU ran of a program.

    A trace may show the same work twice: by stream, and by operation (`XLA Ops`, `XLA Modules`). The streams
    are taken where there are any.
    """
    events = list(events)
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    gpus = {pid for pid, name in processes.items() if name.startswith("/device:GPU")}
    lines = {line: name for line, name in threads.items() if line[0] in gpus}
    kept = {line for line, name in lines.items() if name.startswith("Stream")}
    kept = kept or {line for line, name in lines.items() if name == "XLA Ops"}
    by_line = defaultdict(list)
    for event in events:
        line = event.get("pid"), event.get("tid")
        ours = line in kept if gpus else "hlo_op" in event.get("args", {})
        if event.get("ph") == "X" and ours:
            by_line[line].append(event)
    return [event for line in by_line.values() for event in _alone(line)]


def _alone(line: list[Mapping[str, Any]]) -> Iterable[Event]:
    """The events of one line, each with the time that no event inside it takes."""
    line = sorted(line, key=lambda event: (event["ts"], -event.get("dur", 0)))
    inside, open_events = [0.0] * len(line), []
    for number, event in enumerate(line):
        end = event["ts"] + event.get("dur", 0)
        while open_events and open_events[-1][0] < end:
            open_events.pop()
        if open_events:
            inside[open_events[-1][1]] += event.get("dur", 0)
        open_events.append((end, number))
    for event, taken in zip(line, inside, strict=True):
        arguments = event.get("args", {})
        seconds = 1e-6 * (event.get("dur", 0) - taken)
        yield Event(event["name"], arguments.get("hlo_op"), arguments.get("hlo_module"), max(0.0, seconds))


def divide(events: Iterable[Event], hlo: str) -> Division:
    """Device time of a program by the scopes its instructions were traced in.

    Args:
      events: of a trace in which the program ran; those of other modules are left out.
      hlo: text of the program's optimized module.
    """
    kernels = Kernels.of(hlo)
    parts: dict[str, float] = defaultdict(float)
    mixed = unnamed = 0.0
    for event in events:
        if event.hlo_module not in (None, kernels.module):
            continue
        instruction = kernels.find(event.hlo_op, event.name)
        if instruction is None:
            unnamed += event.seconds
            continue
        parts[part_of(kernels.op_names[instruction])] += event.seconds
        if len({part_of(name) for name in kernels.op_names_inside[instruction]}) > 1:
            mixed += event.seconds
    return Division(dict(parts), mixed, unnamed)


def part_of(op_name: str | None) -> str:
    """`attend` of `jit(step)/jaxkv.attend/dot_general`; the outermost, where one is inside another."""
    if op_name is None:
        return COMPILER
    names = op_name.split("/")
    return next((name.removeprefix(SCOPE) for name in names if name.startswith(SCOPE)), REST)
