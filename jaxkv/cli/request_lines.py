"""Requests as JSON lines: reads them as they come, and says what is wrong with one."""

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, BinaryIO

from jaxkv.cli.prompts import token_ids
from jaxkv.sampling import Sampling
from jaxkv.serving import Request

if TYPE_CHECKING:
    from jaxkv.models import Tokenizer  # which needs an extra

PROMPTS = ("prompt", "messages", "tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
NUMBERS = ("max_new_tokens", "seed", "num_samples", "priority", "salt")
FIELDS = (*PROMPTS, "id", *NUMBERS, *SAMPLING, "stop", "stop_tokens")
# Stop tokens that a request may add to the tokenizer's.
MOST_STOP_TOKENS = 8
# Lines read ahead of the server; then whoever writes them waits.
_MOST_WAITING = 2**16


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank.

    Attributes:
      number: from 1 up, blank lines counted.
      content: its bytes.
      came: `time.monotonic()` when it was read.
    """

    number: int
    content: bytes
    came: float


class Lines:
    """The lines of a file as they come; a thread reads them.

    Args:
      file: is closed after its last line.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._queue: Queue[Line | OSError | None] = Queue(_MOST_WAITING)
        # It may wait for standard input when the process ends.
        self._thread = threading.Thread(target=self._read, name="requests", daemon=True)

    @property
    def waiting(self) -> int:
        """Lines that were read and not yet taken."""
        with self._queue.mutex:
            return sum(isinstance(line, Line) for line in self._queue.queue)

    def __iter__(self) -> Iterator[Line | None]:
        """Yields None where no line has come."""
        self._thread.start()
        while True:
            try:
                line = self._queue.get_nowait()
            except Empty:
                yield None
                continue
            if line is None:
                return
            if isinstance(line, OSError):
                raise line
            yield line

    def close(self) -> None:
        """Closes the file if nothing was asked for; else the thread does."""
        if self._thread.ident is None:
            self._file.close()

    def _read(self) -> None:
        try:
            with self._file:
                for number, content in enumerate(self._file, 1):
                    text = content.removeprefix(b"\xef\xbb\xbf") if number == 1 else content
                    if text.strip():
                        self._queue.put(Line(number, text, time.monotonic()))
        except OSError as error:
            self._queue.put(error)
        self._queue.put(None)


def open_requests(path: str) -> BinaryIO:
    """The file of requests; standard input for "-".

    Raises:
      OSError, ValueError: if it cannot be opened.
    """
    try:
        if path != "-":
            return open(path, "rb")
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        # A file of its own: a thread that waits in `sys.stdin` keeps Python from ending.
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except ValueError as error:
        raise ValueError(f"--requests {path!r}: {error}") from None


def fields_of(line: bytes) -> dict[str, Any]:
    """The fields of a line, without those that are null.

    Raises:
      ValueError: for a line that is not a JSON object in UTF-8.
    """
    try:
        fields = json.loads(line.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the line is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError('the line must be a JSON object, like {"prompt": "Once"}')
    return {name: value for name, value in fields.items() if value is not None}


def _refuse(constant: str):
    raise ValueError(f"{constant} is not a number")


def id_of(fields: dict[str, Any]) -> str | int | float | None:
    """What events of the request are to carry.

    Raises:
      ValueError: for what is neither a string nor a number.
    """
    value = fields.get("id")
    wrong = isinstance(value, bool) or not isinstance(value, str | int | float | None)
    if wrong or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"id={value!r:.200} must be a string or a number")
    return value


def request_of(fields: dict[str, Any], tokenizer: "Tokenizer", options: argparse.Namespace) -> Request:
    """The request that a line's fields describe; the tokenizer's stop tokens always end it.

    Raises:
      ValueError: naming the field that is wrong.
    """
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r:.200}; a request may have {', '.join(FIELDS)}")
    stop = fields.get("stop", [])
    if not isinstance(stop, str | list):
        raise ValueError(f"stop={stop!r:.200} must be a string or a list of strings")
    more = _list(fields, "stop_tokens") if "stop_tokens" in fields else []
    if len(more) > MOST_STOP_TOKENS:
        raise ValueError(f"stop_tokens has {len(more)} token ids; at most {MOST_STOP_TOKENS} are possible")
    sampling = {name: fields[name] for name in SAMPLING if name in fields}
    numbers = {"max_new_tokens": options.max_new_tokens} | {
        name: fields[name] for name in NUMBERS if name in fields
    }
    return Request(
        tokens=_tokens(fields, tokenizer, options),
        sampling=Sampling(**sampling),
        stop=stop,
        stop_tokens=[*more, *tokenizer.stop_tokens],
        **numbers,
    )


def _tokens(fields: dict[str, Any], tokenizer: "Tokenizer", options: argparse.Namespace) -> list[int]:
    given = [name for name in PROMPTS if name in fields]
    if len(given) != 1:
        has = " and ".join(given) or "none of them"
        raise ValueError(f"a request has one of prompt, messages and tokens; this one has {has}")
    if given == ["tokens"]:
        return _list(fields, "tokens")
    if given == ["messages"]:
        return tokenizer.encode_chat(_list(fields, "messages"), parse_special=bool(options.parse_special))
    prompt = fields["prompt"]
    if not isinstance(prompt, str):
        raise ValueError(f"prompt={prompt!r:.200} must be a string")
    if not prompt.strip():
        raise ValueError("prompt is empty")
    return token_ids(tokenizer, [prompt], options)[0]


def _list(fields: dict[str, Any], name: str) -> list:
    value = fields[name]
    if not isinstance(value, list):
        raise ValueError(f"{name}={value!r:.200} must be a list")
    if name == "messages" and not value:
        raise ValueError("messages is empty")
    return value
