"""The parts of text generation, pure functions for a caller's own `jit`: prefill, start, decode."""

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxkv.allocate import allocate
from jaxkv.compact import maybe_compact
from jaxkv.pages import free, rows_of
from jaxkv.sampling import Sampling, sample_each
from jaxkv.state import Batch, KVCache, PolicyState, Status


class CausalLM(Protocol):
    """A model that threads the cache, and is a pytree (an NNX or Equinox module, say)."""

    def __call__(
        self, tokens: Int[Array, " tokens"], cache: KVCache, batch: Batch, *, rows: Array | None = None
    ) -> tuple[Float[Array, "rows vocab"], KVCache]:
        """Logits of the tokens at `rows` (all when None), and the cache.

        A model that a policy can be told of takes `return_mass=True` too. Then it also returns what
        `attend(..., return_mass=True)` gave in each layer, stacked.
        """
        ...


class Finish(IntEnum):
    """Why a sequence ended."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    OUT_OF_PAGES = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Decoding:
    """The state of a decode loop.

    Attributes:
      cache: the cache.
      seqs: slot of each sequence.
      next_tokens: the newest token of each, not yet in the cache.
      output: tokens generated so far.
      num_generated: how many of them.
      finish: a `Finish` for each.
      key: for sampling.
      step: steps taken.
      peak_unshared: most pages that the sequences would have held at once without sharing.
      logits: those each output token was drawn from, where they are wanted; else None.
      policy: what the eviction policy remembers, if there is one.
    """

    cache: KVCache
    seqs: Int[Array, " seqs"]
    next_tokens: Int[Array, " seqs"]
    output: Int[Array, "seqs max_new_tokens"]
    num_generated: Int[Array, " seqs"]
    finish: Int[Array, " seqs"]
    key: PRNGKeyArray
    step: Int[Array, ""]
    peak_unshared: Int[Array, ""]
    logits: Float[Array, "seqs max_new_tokens vocab"] | None = None
    policy: PolicyState | None = None


def prefill(
    model: CausalLM,
    cache: KVCache,
    seqs: Int[Array, " seqs"],
    num_tokens: Int[Array, " seqs"],
    tokens: Int[Array, " tokens"],
    policy: PolicyState | None = None,
) -> tuple[Float[Array, "seqs vocab"], KVCache, PolicyState | None, Int[Array, " seqs"]]:
    """Runs one ragged chunk of prompts through the model; afterwards a policy evicts what is too much.

    Args:
      model: the model.
      cache: the cache.
      seqs: slots; a negative one is padding.
      num_tokens: tokens of each in this chunk.
      tokens: their ids, one sequence after the other, padded at the end.
      policy: the state of an eviction policy.

    Returns:
      The logits after each sequence's last token of the chunk, the cache, the policy's state, and the
      statuses of `allocate`.
    """
    cache, batch = allocate(_tidied(cache), seqs, num_tokens, total_tokens=tokens.shape[0])
    rows = jnp.maximum(batch.query_starts[1:] - 1, 0)
    logits, cache, policy = _run(model, tokens, cache, batch, policy, rows=rows)
    if policy is not None:
        cache, policy, _ = policy.policy.evict(cache, policy, jnp.where(num_tokens > 0, seqs, -1))
    return logits, cache, policy, batch.status


def _run(model: CausalLM, tokens, cache: KVCache, batch: Batch, policy: PolicyState | None, rows=None):
    """The model, with what a policy lets the tokens see; and the policy is told what they looked at."""
    if policy is None:
        return *model(tokens, cache, batch, rows=rows), None
    batch, mass = policy.policy.view(batch), None
    if policy.policy.needs_mass:
        logits, cache, mass = cast(Any, model)(tokens, cache, batch, rows=rows, return_mass=True)
    else:
        logits, cache = model(tokens, cache, batch, rows=rows)
    return logits, cache, policy.policy.observe(policy, cache, batch, mass)


def decode(
    model: CausalLM,
    state: Decoding,
    until: Int[Array, ""] | int,
    *,
    sampling: Sampling,
    stop_tokens: tuple[int, ...] = (),
) -> Decoding:
    """Decodes until every sequence has finished or `until` steps are taken: one `lax.while_loop`.

    A sequence that finishes gives its pages back at once. One that finds no free page waits for
    that; when all are waiting, the last of them ends with `OUT_OF_PAGES` and makes room. With
    `CacheConfig.compact_automatically` a step begins with `maybe_compact`. A policy evicts from the sequences
    that have filled a page, before they are given another.

    Args:
      model: the model.
      state: where the loop stands.
      until: total steps after which to return; may be traced, so blocks share one program.
      sampling: how tokens are chosen.
      stop_tokens: ids that end a sequence.

    Returns:
      The state after the last step.
    """

    def unfinished(state: Decoding):
        return (state.step < until) & jnp.any(state.finish == Finish.RUNNING)

    step = partial(_decode_step, model, sampling=sampling, stop_tokens=stop_tokens)
    return jax.lax.while_loop(unfinished, step, state)


def _decode_step(model, state: Decoding, *, sampling: Sampling, stop_tokens: tuple[int, ...]) -> Decoding:
    running = state.finish == Finish.RUNNING
    seqs = jnp.where(running, state.seqs, -1)
    cache, policy, blocked = _evict_full(state, seqs)
    cache, batch = allocate(_tidied(cache), jnp.where(blocked, -1, seqs), jnp.ones_like(seqs))
    logits, cache, policy = _run(model, state.next_tokens, cache, batch, policy)
    status = jnp.where(blocked, Status.OUT_OF_PAGES, batch.status)
    state = replace(
        state,
        cache=cache,
        step=state.step + 1,
        peak_unshared=_peak_unshared(state, cache),
        policy=state.policy if policy is None else policy,
    )
    return _take(state, logits, running, status, sampling, stop_tokens)


def _evict_full(state: Decoding, seqs) -> tuple[KVCache, PolicyState | None, Bool[Array, " seqs"]]:
    """Lets the policy evict from the sequences that have filled a page.

    Also says which are as long as before, with no room for more: siblings hold their pages, and there are
    none for copies.
    """
    cache, policy = state.cache, state.policy
    # A policy for prompts has done its work.
    if policy is None or policy.policy.observe_last is not None:
        return cache, None, jnp.zeros(seqs.shape, bool)
    fills_page = rows_of(cache.table.lengths, state.seqs) % cache.config.page_size == 0
    cache, policy, _ = policy.policy.evict(cache, policy, jnp.where(fills_page, seqs, -1))
    full = rows_of(cache.table.lengths, state.seqs) >= policy.policy.capacity(cache.config)
    return cache, policy, fills_page & full & (seqs >= 0)


def _tidied(cache: KVCache) -> KVCache:
    """Compacted when due, if the config wants that: before the step's batch says where pages lie."""
    return maybe_compact(cache) if cache.config.compact_automatically else cache


def _take(state: Decoding, logits, running: Bool[Array, " seqs"], status, sampling, stop_tokens) -> Decoding:
    """Draws a token for each sequence that ran, notes it, and lets the finished ones go."""
    ran = running & (status == Status.OK)
    entry = jnp.arange(state.seqs.shape[0], dtype=jnp.int32)
    tokens = sample_each(_draw_keys(state, entry), logits, sampling)
    room = state.output.shape[1]
    column = jnp.where(ran, state.num_generated, room)
    num_generated = state.num_generated + ran.astype(jnp.int32)

    stopped = ran & jnp.isin(tokens, jnp.asarray(stop_tokens, jnp.int32))
    full = (num_generated == room) | (status == Status.SEQUENCE_TOO_LONG)
    waiting = running & (status == Status.OUT_OF_PAGES)
    stuck = waiting & (entry == jnp.max(jnp.where(waiting, entry, -1))) & ~jnp.any(ran)
    finish = jnp.select(
        [stopped, running & full, stuck], [Finish.STOP, Finish.LENGTH, Finish.OUT_OF_PAGES], state.finish
    ).astype(jnp.int32)
    ended = running & (finish != Finish.RUNNING)
    return replace(
        state,
        cache=free(state.cache, jnp.where(ended, state.seqs, -1)),
        next_tokens=jnp.where(ran, tokens, state.next_tokens),
        output=state.output.at[entry, column].set(tokens, mode="drop"),
        num_generated=num_generated,
        finish=finish,
        logits=None if state.logits is None else state.logits.at[entry, column].set(logits, mode="drop"),
    )


def end(state: Decoding, ends: Bool[Array, " seqs"]) -> Decoding:
    """Ends sequences with `Finish.STOP` and frees their pages.

    One that has ended by itself keeps its tokens, and `STOP` is its reason from now on.

    Args:
      state: between two steps.
      ends: which sequences.
    """
    finish = jnp.where(ends, Finish.STOP, state.finish).astype(jnp.int32)
    return replace(state, cache=free(state.cache, jnp.where(ends, state.seqs, -1)), finish=finish)


def _draw_keys(state: Decoding, entry: Int[Array, " seqs"]) -> PRNGKeyArray:
    """A key for each sequence and place in its text, so that waiting for a page changes no draw."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(jax.random.fold_in)(fold(state.key, entry), state.num_generated)


def _peak_unshared(state: Decoding, cache: KVCache) -> Int[Array, ""]:
    lengths, page_size = cache.table.lengths, cache.config.page_size
    held = jnp.sum((lengths + page_size - 1) // page_size, dtype=jnp.int32)
    return jnp.maximum(state.peak_unshared, held)


def start(
    cache: KVCache,
    seqs: Int[Array, " seqs"],
    logits: Float[Array, "seqs vocab"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: tuple[int, ...] = (),
    keep_logits: bool = False,
    policy: PolicyState | None = None,
) -> Decoding:
    """The state of a decode loop after prefill, with each sequence's first token drawn.

    Args:
      cache: the cache, prompts in it.
      seqs: slots.
      logits: after each prompt's last token.
      key: for sampling.
      max_new_tokens: hard cap, for every sequence.
      sampling: how tokens are chosen.
      stop_tokens: ids that end a sequence.
      keep_logits: keep the logits of every output token; `seqs * max_new_tokens * vocab` floats.
      policy: the state of an eviction policy, after prefill.
    """
    num_seqs, vocab = logits.shape
    zeros = jnp.zeros(num_seqs, jnp.int32)
    state = Decoding(
        cache=cache,
        seqs=seqs,
        next_tokens=zeros,
        output=jnp.zeros((num_seqs, max_new_tokens), jnp.int32),
        num_generated=zeros,
        finish=zeros,
        key=key,
        step=jnp.zeros((), jnp.int32),
        peak_unshared=jnp.zeros((), jnp.int32),
        logits=jnp.zeros((num_seqs, max_new_tokens, vocab)) if keep_logits else None,
        policy=policy,
    )
    state = replace(state, peak_unshared=_peak_unshared(state, cache))
    return _take(state, logits, jnp.ones(num_seqs, bool), zeros, sampling, stop_tokens)
