"""Shows progress on standard error, and the text of a generation as it is generated."""

import sys
import time
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from jaxkv.decode import Decoding, Finish
from jaxkv.models import LoadedModel, TextStreams, Tokenizer, load

# Decode steps between two updates of the texts.
STEPS_A_BLOCK = 8


def load_with_progress(path_or_name: str) -> tuple[LoadedModel, Tokenizer]:
    """Loads a model and its tokenizer.

    Raises:
      ValueError: for a model without a tokenizer.
    """
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    # When it is not a terminal, progress would leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("weights", total=None)
        loaded = load(
            path_or_name,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if loaded.tokenizer is None:
        raise ValueError(f"{path_or_name}: has no tokenizer.json")
    return loaded, loaded.tokenizer


class Status:
    """A line on a terminal with the current activity and its duration; nothing elsewhere.

    Args:
      text: the first activity.
      console: the terminal. Default: standard error.
    """

    def __init__(self, text: str, console: Console | None = None):
        self.console = Console(stderr=True) if console is None else console
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        shown = self.console.is_terminal
        self._progress = Progress(*columns, console=self.console, transient=True, disable=not shown)
        self._task = self._progress.add_task(text, total=None)
        self._began = time.monotonic()

    def __enter__(self) -> "Status":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def seconds(self) -> float:
        """Duration of the current activity so far."""
        return time.monotonic() - self._began

    def next(self, text: str) -> None:
        """Starts another activity."""
        self._progress.reset(self._task, description=text)
        self._began = time.monotonic()

    def update(self, text: str) -> None:
        """Changes the text of the current activity."""
        self._progress.update(self._task, description=text)

    def stop(self) -> None:
        """Removes the line."""
        self._progress.stop()

    def say_compiled(self, text: str = "compiled and ran the prompts") -> None:
        """Prints a lasting line if there is no terminal to show progress on."""
        if not self.console.is_terminal:
            print(f"{text} in {self.seconds:.1f} s", file=sys.stderr, flush=True)


class Watch:
    """Shows a running generation: its text if there is one sequence, else its progress.

    Args:
      tokenizer: the model's.
      max_new_tokens: most tokens of a sequence.
      stream: whether to print the text of the only sequence as it is generated.
      stop: texts that end a sequence.

    Attributes:
      texts: the texts so far.
    """

    def __init__(self, tokenizer: Tokenizer, max_new_tokens: int, *, stream: bool, stop: Iterable[str] = ()):
        self.texts = TextStreams(tokenizer, stop)
        self._most, self._stream, self._compiled = max_new_tokens, stream, False
        self._status = Status("compiling")

    def __enter__(self) -> "Watch":
        self._status.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._status.stop()
        if self._stream and self._compiled:
            print(flush=True)

    def see(self, state: Decoding) -> np.ndarray:
        """To be called after each block of steps; returns which sequences a stop string ends."""
        if not self._compiled:
            self._status.say_compiled()
            self._status.next("decoding")
            self._compiled = True
        ends = self.texts(state)
        if self._stream:
            self._status.stop()
            print(self.texts.pieces[0], end="", flush=True)
            return ends
        running = int(np.sum((np.asarray(state.finish) == Finish.RUNNING) & ~ends))
        most = int(np.asarray(state.num_generated).max())
        self._status.update(f"decoding: {most} of {self._most} tokens, {running} running")
        return ends
