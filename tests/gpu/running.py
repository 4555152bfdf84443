"""Running parts of `check_gpu` in processes of their own, and the outcome of a part."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The exit status of a process that was ended because its time was over.
LATE = 124


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    seed: int
    weights: str
    cases: tuple[str, ...]
    jobs: int = 1
    limit: float | None = None


def module(
    options: Options,
    name: str,
    *arguments: str,
    under: list[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs one of the modules beside this one; its exit status is `LATE` where `--limit` ended it."""
    command = [*(under or ()), sys.executable, "-m", f"tests.gpu.{name}", *arguments]
    everything = {**os.environ, **(environment or {})}
    pipe = subprocess.PIPE
    # A session of its own, so that what a sanitizer runs ends with it.
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=everything, start_new_session=True
    ) as process:
        try:
            output = process.communicate(timeout=options.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()
            return subprocess.CompletedProcess(command, LATE, *output)
    return subprocess.CompletedProcess(command, process.returncode, *output)


def outcome(right: bool, note: str, **more: Any) -> dict[str, Any]:
    """Of a part that ran."""
    return {"ran": True, "right": right, "note": note, **more}


def judged(right: bool, unfinished: bool, note: str, **more: Any) -> dict[str, Any]:
    """Of a part that may be unfinished: then it is not right, but what was wrong stays wrong."""
    if right and unfinished:
        return {"ran": False, "right": None, "note": note, **more}
    return outcome(right, note, **more)


def not_run(reason: str) -> dict[str, Any]:
    """Of a part that did not: it is neither right nor wrong."""
    return {"ran": False, "right": None, "note": f"not run: {reason}"}
