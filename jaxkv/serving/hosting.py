"""Serving from the host: requests in as they come, events out as they happen."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.arguments import integer
from jaxkv.causal_lm import CausalLM
from jaxkv.decode import Finish
from jaxkv.invariants import status_text
from jaxkv.request import check_model
from jaxkv.serving.config import ServingConfig
from jaxkv.serving.drawing import LogitsFn
from jaxkv.serving.requests import Request, Requests
from jaxkv.serving.running import run, vocabulary
from jaxkv.serving.state import ServingState, init
from jaxkv.serving.submitting import Events, cancel, submit, take
from jaxkv.state import Status

if TYPE_CHECKING:
    from jaxkv.models.text_stream import TextStream
    from jaxkv.models.tokenizer import Tokenizer

# The state was made here, so these may donate it.
_submit = jax.jit(submit, donate_argnames="state")
_run = jax.jit(run, static_argnames="logits_fn", donate_argnames="state")
_take = jax.jit(take, static_argnames="width", donate_argnames="state")
_cancel = jax.jit(cancel, donate_argnames="state")

_IDLE_SECONDS = 0.002

OnState: TypeAlias = Callable[[ServingState], object]


@dataclass(frozen=True, slots=True)
class Event:
    """New tokens of a sample, its end, or both.

    Attributes:
      id: the request's.
      sample: number of the sample among those of its request.
      tokens: new ones; after a stop string, to the end of the block.
      finish: why the sample ended; RUNNING if it goes on.
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


@overload
def serve(
    model: CausalLM,
    config: ServingConfig,
    requests: Iterable[Request | None],
    *,
    tokenizer: "Tokenizer | None" = ...,
    logits_fn: LogitsFn | None = ...,
    block: int = ...,
    on_state: OnState | None = ...,
) -> Iterator[Event]: ...


@overload
def serve(
    model: CausalLM,
    config: ServingConfig,
    requests: AsyncIterable[Request],
    *,
    tokenizer: "Tokenizer | None" = ...,
    logits_fn: LogitsFn | None = ...,
    block: int = ...,
    on_state: OnState | None = ...,
) -> AsyncIterator[Event]: ...


def serve(
    model: CausalLM,
    config: ServingConfig,
    requests: Iterable[Request | None] | AsyncIterable[Request],
    *,
    tokenizer: "Tokenizer | None" = None,
    logits_fn: LogitsFn | None = None,
    block: int = 8,
    on_state: OnState | None = None,
) -> Iterator[Event] | AsyncIterator[Event]:
    """Serves requests as they come, and yields what happens as it happens.

    Every step is part of one compiled loop; the host looks in after each block of steps, to put in new
    requests and take out new tokens. Requests beyond the request table wait on the host.

    Args:
      model: the model.
      config: sizes of the server.
      requests: any iterable or async iterable. An iterable may yield None where no request has come yet; else
        it is asked for the next request only when there is room for it. Requests without an `id` are numbered
        from 0. An id is free again when all samples of its request have ended.
      tokenizer: gives events their `text`, and ends samples at the stop strings of their requests.
      logits_fn: changes logits before a token is chosen; see `run`.
      block: steps between two looks.
      on_state: called with the state after each block, for metrics (`ServingMetrics.observe`). It must not
        keep it: the next block donates it. If it returns True, this block is the last: its events are
        yielded, and what is left is dropped.

    Yields:
      An `Event` for each sample with new tokens, and one with an `error` for each refused request.

    Raises:
      ValueError: for a model whose results do not match `CausalLM`, or bad options.

    Example:
      >>> import jax, jaxkv
      >>> from jaxkv.models import ModelConfig, random_model
      >>> from jaxkv.serving import Request, ServingConfig, serve
      >>> model = random_model(ModelConfig(vocab_size=16, hidden_size=8, num_layers=1, num_q_heads=1,
      ...     num_kv_heads=1, head_dim=8, intermediate_size=8, max_context=64), jax.random.key(0))
      >>> config = ServingConfig(model.cache_config(num_pages=8, max_seqs=2), token_budget=8)
      >>> requests = [Request(tokens=[1, 2, 3], max_new_tokens=4), Request(tokens=[5], max_new_tokens=2)]
      >>> sorted((event.id, len(event.tokens), event.finish.name) for event in serve(model, config, requests))
      [(0, 4, 'LENGTH'), (1, 2, 'LENGTH')]
    """
    host = _Host(model, config, tokenizer, logits_fn, integer("block", block), on_state)
    if isinstance(requests, AsyncIterable):
        return _serve_async(host, requests)
    return _serve(host, iter(requests))


def _serve(host: "_Host", requests: Iterator[Request | None]) -> Iterator[Event]:
    ended = False
    while not host.stops and (not ended or host.busy):
        waits = False
        while host.has_room and not ended and not waits:
            try:
                request = next(requests)
            except StopIteration:
                ended = True
                break
            waits = request is None
            if request is not None:
                host.put(request)
        if host.busy:
            yield from host.advance()
        elif waits:
            time.sleep(_IDLE_SECONDS)


async def _serve_async(host: "_Host", requests: AsyncIterable[Request]) -> AsyncIterator[Event]:
    iterator = aiter(requests)
    coming: asyncio.Task | None = None
    ended = False
    try:
        while not host.stops and (not ended or host.busy):
            if coming is None and not ended and host.has_room:
                coming = asyncio.ensure_future(anext(iterator))
            if coming is not None:
                # Nothing runs: wait for a request; else look whether one has come.
                await asyncio.wait([coming], timeout=0 if host.busy else None)
                if coming.done():
                    try:
                        host.put(coming.result())
                    except StopAsyncIteration:
                        ended = True
                    coming = None
                    if host.has_room and not ended:
                        continue
            if host.busy:
                for event in await asyncio.to_thread(host.advance):
                    yield event
    finally:
        if coming is not None:
            # Waited for: until it has ended, the iterable cannot be closed.
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


class _Host:
    """The requests that are not in the server yet, and the texts of those that are."""

    def __init__(self, model, config: ServingConfig, tokenizer, logits_fn, block: int, on_state):
        if not isinstance(config, ServingConfig):
            raise ValueError(f"config={config!r:.200} must be a jaxkv.serving.ServingConfig")
        check_model(model, config.policy)
        self._config, self._tokenizer, self._block, self._on_state = config, tokenizer, block, on_state
        self._vocab = vocabulary(model, jax.eval_shape(partial(init, config)))
        self._advance = partial(_run, model, logits_fn=logits_fn)
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
            self._refused.append(Event(number, error=fault))
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

    def advance(self) -> list[Event]:
        """A block of steps."""
        events, self._refused = self._refused, []
        events += self._submit_pending()
        self._until += self._block
        self._state = self._advance(self._state, jnp.asarray(self._until, jnp.int32))
        width = self._block * self._config.tokens_per_sample
        self._state, new = _take(self._state, width=width)
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
        self._state, status = _submit(self._state, arrays)
        refused = []
        for request, one in zip(now, np.asarray(status).tolist(), strict=False):
            if one != Status.OK:
                assert request.id is not None
                self._rows -= request.num_samples
                del self._running[request.id], self._taken[request.id]
                for sample in range(request.num_samples):
                    del self._streams[request.id, sample]
                refused.append(Event(request.id, error=status_text(Status(one))))
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
        self._state = _cancel(self._state, ids, samples=samples)
        self._state, rest = _take(self._state, width=self._block * self._config.tokens_per_sample)
        self._rows -= int(np.sum(rest.finish != Finish.RUNNING))
