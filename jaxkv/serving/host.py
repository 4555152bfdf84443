"""The requests that are not in a server yet, and the texts of those that are."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.decode import Finish
from jaxkv.invariants import refusal
from jaxkv.request import check_model
from jaxkv.serving import programs
from jaxkv.serving.config import ServingConfig
from jaxkv.serving.requests import Request, Requests
from jaxkv.serving.running import vocabulary
from jaxkv.serving.state import ServingState, init
from jaxkv.serving.submitting import Events
from jaxkv.state import Status

if TYPE_CHECKING:
    from jaxkv.models.text_stream import TextStream

OnState: TypeAlias = Callable[[ServingState], object]


@dataclass(frozen=True, slots=True)
class Event:
    """New tokens of a sample, its end, or both.

    Attributes:
      id: the request's.
      sample: number of the sample among those of its request.
      tokens: new ones; after a stop string, to the end of the block.
      finish: why the sample ended; RUNNING if it goes on, REFUSED if the request was refused.
      text: what the tokens say, with a tokenizer: whole characters, up to a stop string. The pieces of a
        sample join to its text.
      log_probs: of the tokens, with `ServingConfig.log_probs`.
      error: why the request was refused; then there is nothing else.
      seconds: from when `serve` took the request to when the tokens reached the host; not compared.
    """

    id: int
    sample: int = 0
    tokens: tuple[int, ...] = ()
    finish: Finish = Finish.RUNNING
    text: str = ""
    log_probs: tuple[float, ...] = ()
    error: str | None = None
    seconds: float = field(default=0.0, compare=False)


class Host:
    """The requests that are not in the server yet, and the texts of those that are."""

    def __init__(self, model, config: ServingConfig, tokenizer, logits_fn, block: int, on_state):
        if not isinstance(config, ServingConfig):
            raise ValueError(f"config={config!r:.200} must be a jaxkv.serving.ServingConfig")
        check_model(model, config.policy)
        self._config, self._tokenizer, self._block, self._on_state = config, tokenizer, block, on_state
        self._vocab = vocabulary(model, jax.eval_shape(partial(init, config)))
        self._advance = partial(programs.run, model, logits_fn=logits_fn)
        self._state = jax.jit(init, static_argnums=0)(config)
        self._entries = min(16, config.max_requests)
        self._pending: deque[Request] = deque()
        self._refused: list[Event] = []
        self._running: dict[int, int] = {}  # samples of each id that have not ended
        self._rows, self._until, self._next_id = 0, 0, 0
        self._taken: dict[int, float] = {}  # when each id in `_running` came
        self.stops = False
        self._streams: dict[tuple[int, int], TextStream | None] = {}

    @property
    def has_room(self) -> bool:
        """Whether another request may come before the next block."""
        return len(self._pending) + len(self._refused) < self._entries

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._pending or self._running or self._refused)

    def put(self, request: Request) -> None:
        """Takes a request, to be submitted when its samples find empty rows."""
        if not isinstance(request, Request):
            raise ValueError(f"requests must be jaxkv.serving.Request, not {request!r:.200}")
        number = request.id
        if number is None:
            number = self._next_id
            while number in self._running:
                number = (number + 1) % 2**31
        request = replace(request, id=number)
        self._next_id = max(self._next_id, number + 1) % 2**31
        if fault := self._fault(request):
            self._refused.append(Event(number, finish=Finish.REFUSED, error=fault))
            return
        self._pending.append(request)
        self._running[number] = request.num_samples
        self._taken[number] = time.monotonic()
        for sample in range(request.num_samples):
            stream = None if self._tokenizer is None else self._tokenizer.stream(request.stop)
            self._streams[number, sample] = stream

    def _fault(self, request: Request) -> str | None:
        if request.id in self._running:
            return f"id {request.id} is that of a request that has not ended"
        most = min(self._config.cache.max_seqs, self._config.max_requests)
        if request.num_samples > most:
            return f"num_samples={request.num_samples} is more than run at once, {most}"
        if request.stop and self._tokenizer is None:
            return "stop strings need a tokenizer"
        if len(request.stop_tokens) > self._config.max_stop_tokens:
            return (
                f"{len(request.stop_tokens)} stop tokens are more than "
                f"max_stop_tokens={self._config.max_stop_tokens}"
            )
        for name, ids in (("tokens", request.tokens), ("stop_tokens", request.stop_tokens)):
            if ids and max(ids) >= self._vocab:
                return f"{name}: token id {max(ids)} is beyond the vocabulary of {self._vocab} tokens"
        return None

    def _why(self, request: Request, status: Status) -> str:
        """What `submit` refused, with its numbers where the status alone has none."""
        cache, length = self._config.cache, len(request.tokens)
        if status == Status.SEQUENCE_TOO_LONG:
            return (
                f"the prompt has {length} tokens; with one more it exceeds "
                f"max_tokens={self._config.max_tokens}, or the {cache.max_tokens_per_seq} tokens of a row of "
                "the page table"
            )
        if status == Status.OUT_OF_PAGES:
            return (
                f"the prompt has {length} tokens; a pool of {cache.num_pages} pages of {cache.page_size} "
                f"tokens never holds it with one token of each of {request.num_samples} samples"
            )
        return str(refusal(status))

    def advance(self) -> list[Event]:
        """A block of steps."""
        events, self._refused = self._refused, []
        events += self._submit_pending()
        self._until += self._block
        self._state = self._advance(self._state, jnp.asarray(_wrapped(self._until), jnp.int32))
        width = self._block * self._config.tokens_per_sample
        self._state, new = programs.take(self._state, width=width)
        events += self._events_of(jax.device_get(new))
        self._until = int(self._state.stats.steps)
        if self._on_state is not None:
            self.stops = self._on_state(self._state) is True
        return events

    def _submit_pending(self) -> list[Event]:
        """Submits requests in order, up to the first whose samples find too few empty rows."""
        now: list[Request] = []
        while self._pending and len(now) < self._entries:
            rows = self._pending[0].num_samples
            if self._rows + rows > self._config.max_requests:
                break
            self._rows += rows
            now.append(self._pending.popleft())
        if not now:
            return []
        arrays = Requests.of(now, self._config, entries=self._entries)
        self._state, status = programs.submit(self._state, arrays)
        refused = []
        for request, one in zip(now, np.asarray(status).tolist(), strict=False):
            if one != Status.OK:
                assert request.id is not None
                self._rows -= request.num_samples
                del self._running[request.id], self._taken[request.id]
                for sample in range(request.num_samples):
                    del self._streams[request.id, sample]
                error = self._why(request, Status(one))
                refused.append(Event(request.id, finish=Finish.REFUSED, error=error))
        return refused

    def _events_of(self, new: Events) -> list[Event]:
        events, stopped = [], []
        now = time.monotonic()
        for row in np.flatnonzero((new.counts > 0) | (new.finish != Finish.RUNNING)):
            count, key = int(new.counts[row]), (int(new.ids[row]), int(new.samples[row]))
            tokens = tuple(new.tokens[row, :count].tolist())
            finish = Finish(int(new.finish[row]))
            probs = () if new.log_probs is None else tuple(new.log_probs[row, :count].tolist())
            if finish != Finish.RUNNING:
                self._rows -= 1
            if key not in self._streams:
                continue  # after its stop string
            stream = self._streams[key]
            text = "" if stream is None else stream.push(tokens)
            if stream is not None and finish != Finish.RUNNING:
                text += stream.finish()
            if stream is not None and stream.stopped:
                stopped += [key] if finish == Finish.RUNNING else []
                finish = Finish.STOP
            events.append(Event(*key, tokens, finish, text, probs, seconds=now - self._taken[key[0]]))
            if finish != Finish.RUNNING:
                self._end(key)
        if stopped:
            self._cancel(stopped)
        return events

    def _end(self, key: tuple[int, int]) -> None:
        del self._streams[key]
        self._running[key[0]] -= 1
        if not self._running[key[0]]:
            del self._running[key[0]], self._taken[key[0]]

    def _cancel(self, keys: list[tuple[int, int]]) -> None:
        """Ends samples at their stop strings; their rows are empty before their ids can be used again."""
        most = self._config.max_requests
        ids, samples = (
            jnp.asarray(np.array([*column] + [-1] * (most - len(keys)), np.int32))
            for column in zip(*keys, strict=True)
        )
        self._state = programs.cancel(self._state, ids, samples=samples)
        self._state, rest = programs.take(self._state, width=self._block * self._config.tokens_per_sample)
        self._rows -= int(np.sum(rest.finish != Finish.RUNNING))


def _wrapped(steps: int) -> int:
    """A count of steps as int32 has it."""
    return (steps + 2**31) % 2**32 - 2**31
