"""Serving from the host: requests in as they come, events out as they happen."""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, overload

from jaxkv.arguments import integer
from jaxkv.causal_lm import CausalLM
from jaxkv.serving.config import ServingConfig
from jaxkv.serving.drawing import LogitsFn
from jaxkv.serving.host import Event, Host, OnState
from jaxkv.serving.requests import Request

if TYPE_CHECKING:
    from jaxkv.models.tokenizer import Tokenizer

_IDLE_SECONDS = 0.002


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
    host = Host(model, config, tokenizer, logits_fn, integer("block", block), on_state)
    if isinstance(requests, AsyncIterable):
        return _serve_async(host, requests)
    return _serve(host, iter(requests))


def _serve(host: "Host", requests: Iterator[Request | None]) -> Iterator[Event]:
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


async def _serve_async(host: "Host", requests: AsyncIterable[Request]) -> AsyncIterator[Event]:
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
