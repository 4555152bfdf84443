"""A server in a process of its own: work comes in on standard input, results go out on standard output.

    python -m benchmarks.serving_worker MODULE FUNCTION

The function, of a module of this folder, returns a `serving_work.Serve`. The first line out says whether it
is there, or why not; then each line in is one `Work` as JSON, and each line out a `Served`.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.serving_work import Served, Work


class Worker:
    """A server in another process; `absent` is the reason why it is not there."""

    def __init__(self, module: str, function: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving_worker", module, function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            text=True,
        )
        self.absent: str | None = self._answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def serve(self, work: Work) -> Served:
        """Serves requests there.

        Raises:
          RuntimeError: when the other process ended; its message is on standard error.
        """
        assert self._process.stdin is not None
        # If it has ended, what follows tells how.
        with suppress(BrokenPipeError):
            print(json.dumps(work), file=self._process.stdin, flush=True)
        return Served(*self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a server ended with status {self._process.wait()}")
        return json.loads(line)


def main() -> None:
    """The other process."""
    # Libraries print to standard output; answers go to a copy of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, function = sys.argv[1:]
    try:
        serve = getattr(import_module(f"benchmarks.{module}"), function)()
    except ImportError as error:
        print(json.dumps(str(error)), file=answers, flush=True)
        return
    print(json.dumps(None), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(Work(*json.loads(line)))), file=answers, flush=True)
    answers.flush()
    # Threads of a library may never end.
    os._exit(0)


if __name__ == "__main__":
    main()
