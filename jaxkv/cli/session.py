"""What `jaxkv serve` knows of its requests: reads them, writes their events, and counts."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TextIO

import jax
import numpy as np

from jaxkv.cli.request_lines import Line, Lines, fields_of, id_of, request_of
from jaxkv.decode import Finish
from jaxkv.serving import Event, Phase, Request, ServingConfig, ServingState, ServingStats

if TYPE_CHECKING:
    from jaxkv.cli.progress import Status  # which needs an extra
    from jaxkv.models import Tokenizer


@dataclass(frozen=True, slots=True)
class Observers:
    """Who is told of each state and of each event."""

    observe: Callable[[ServingState], None] = lambda state: None
    see: Callable[[Event], None] = lambda event: None


@dataclass(slots=True)
class _Open:
    """A request that has not ended: what its events begin with, when it came, and its samples left."""

    name: dict[str, Any]
    came: float
    samples: int


class Session:
    """Requests by the numbers that the server knows them by, and what became of them.

    Attributes:
      open: those that have not ended.
      interrupted: whether Ctrl-C was pressed; what is finished is still written.
      status: the line that shows progress.
    """

    def __init__(
        self,
        lines: Lines,
        output: TextIO,
        tokenizer: "Tokenizer",
        config: ServingConfig,
        options: argparse.Namespace,
        observers: Observers,
    ):
        self.open: dict[int, _Open] = {}
        self.interrupted = False
        self.status: Status | None = None
        self._lines, self._output, self._observers = lines, output, observers
        self._tokenizer, self._config, self._options = tokenizer, config, options
        self._ids: set[str] = set()
        self._begun: set[tuple[int, int]] = set()
        self._first: list[float] = []
        self._requests = self._refused = self._tokens = 0
        self._began = self._ended = time.monotonic()
        self._stats = dict.fromkeys(ServingStats.names(), 0)

    def requests(self) -> Iterator[Request | None]:
        """Requests as they come, None where none has; a line that is wrong is answered at once."""
        lines = iter(self._lines)
        while not self.interrupted:
            try:
                line = next(lines)
            except StopIteration:
                return
            request = None if line is None else self._request(line)
            if line is None or request is not None:
                yield request

    def _request(self, line: Line) -> Request | None:
        if not self._requests:
            self._began = line.came
        number, self._requests = self._requests, self._requests + 1
        name: dict[str, Any] = {"id": None, "line": line.number}
        try:
            fields = fields_of(line.content)
            if (given := id_of(fields)) is not None:
                name = {"id": given}
            if given is not None and json.dumps(given) in self._ids:
                raise ValueError(f"id={given!r:.200} is that of a request that has not ended")
            request = replace(request_of(fields, self._tokenizer, self._options), id=number)
            self._check_size(request)
        except ValueError as error:
            self._refuse(name, str(error))
            return None
        self.open[number] = _Open(name, line.came, request.num_samples)
        self._ids.add(json.dumps(name["id"]))
        return request

    def _check_size(self, request: Request) -> None:
        length, config = len(request.tokens), self._config
        most = min(config.max_tokens - 1, config.cache.max_tokens_per_seq)
        if length > most:
            raise ValueError(f"the prompt has {length} tokens; at most {most} fit")
        if request.num_samples > config.cache.max_seqs:
            raise ValueError(
                f"num_samples={request.num_samples} is more than --slots {config.cache.max_seqs}"
            )

    def _refuse(self, name: dict[str, Any], error: str) -> None:
        self._refused += 1
        self._write(name | {"error": error})
        self._observers.see(Event(-1, finish=Finish.REFUSED, error=error))

    def answer(self, event: Event) -> None:
        """Writes an event."""
        request, key = self.open[event.id], (event.id, event.sample)
        self._ended = time.monotonic()
        if event.error is not None:
            self._forget(event.id)
            self._refuse(request.name, event.error)
            return
        event = replace(event, seconds=self._ended - request.came)
        self._observers.see(event)
        if event.tokens and key not in self._begun:
            self._begun.add(key)
            self._first.append(event.seconds)
        self._tokens += len(event.tokens)
        goes_on = event.finish == Finish.RUNNING
        fields = request.name | {
            "sample": event.sample,
            "text": event.text,
            "tokens": event.tokens,
            "finish": None if goes_on else event.finish.name.lower(),
        }
        if self._config.log_probs:
            # JSON has no NaN.
            fields["log_probs"] = [each if math.isfinite(each) else None for each in event.log_probs]
        self._write(fields)
        if not goes_on:
            self._begun.discard(key)
            request.samples -= 1
            if not request.samples:
                self._forget(event.id)

    def _forget(self, number: int) -> None:
        self._ids.discard(json.dumps(self.open.pop(number).name["id"]))

    def _write(self, fields: dict[str, Any]) -> None:
        text = json.dumps(fields, ensure_ascii=False)
        try:
            text.encode(self._output.encoding or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(fields)  # with escapes
        print(text, file=self._output, flush=True)

    def on_state(self, state: ServingState) -> bool:
        """Shows progress and publishes metrics; returns whether to stop."""
        phase, counters = jax.device_get((state.requests.phase, state.stats.counters))
        self._stats = dict(zip(ServingStats.names(), np.asarray(counters).tolist(), strict=True))
        running, waiting = (int(np.sum(phase == of)) for of in (Phase.RUNNING, Phase.WAITING))
        speed = self._stats["new_tokens"] / max(time.monotonic() - self._began, 1e-9)
        if self.status is not None:
            self.status.update(
                f"{running} running, {waiting} waiting, {self._stats['finished']} finished, "
                f"{speed:.1f} tokens/s"
            )
        self._observers.observe(state)
        return self.interrupted

    def figures(self) -> str:
        """What happened, in one line."""
        seconds = max(self._ended - self._began, 1e-9)
        refused = f" ({self._refused} refused)" if self._refused else ""
        first = "no first token"
        if self._first:
            median, late = np.percentile(self._first, [50, 95])
            first = f"first token after {median:.2f} s (median), {late:.2f} s (95%)"
        return (
            f"{self._requests} requests{refused}, {self._tokens} tokens at {self._tokens / seconds:.1f} "
            f"tokens/s, {first}, {self._stats['preemptions']} preemptions, "
            f"{self._stats['matched_tokens']} tokens found in the prefix cache"
        )
