"""Beam search after `prefill`, as pure functions for the caller's `jit`: start, and a compiled loop."""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxkv.allocation import allocate
from jaxkv.causal_lm import CausalLM, run_model
from jaxkv.decode import Finish, pages_unshared
from jaxkv.entries import rows_of
from jaxkv.pages import truncate
from jaxkv.prefill import tidied
from jaxkv.reordering import reorder
from jaxkv.selection import largest
from jaxkv.state import KVCache, Status
from pallas_kernels import control_flow


class EarlyStopping(IntEnum):
    """When the search of a prompt ends whose pool is full, by transformers' names.

    FALSE: when the best beam, scored at its present length, does not exceed the worst of the pool. TRUE: at
    once. NEVER: when the best beam could not exceed it at any length.
    """

    FALSE = 0
    TRUE = 1
    NEVER = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Beams:
    """The state of a beam search over several prompts.

    Each prompt has `width` beams, best first, and a pool of the `width` best sequences that have ended.

    Attributes:
      cache: the cache. Each beam holds its prompt and all its tokens but the newest.
      slots: of each beam; that of an ended beam is empty.
      tokens: new tokens of each beam, -1 after them.
      log_probs: the sum of their log-probabilities, float32; -inf for a beam that does not exist.
      num_generated: new tokens of each beam of a prompt.
      limits: most new tokens of each prompt's sequences: what was asked for, or less for a shorter row.
      pool_tokens: those of the best sequences that have ended, best first, a stop token included.
      pool_scores: `log_probs / length ** length_penalty`; -inf where the pool has no sequence yet.
      finish: why the search of a prompt ended, a `Finish`.
      length_penalty: the exponent.
      step: steps taken.
      peak_unshared: most pages that the beams would have used at once without sharing.
      stop_tokens: ids that end a sequence.
      early_stopping: an `EarlyStopping`.
    """

    cache: KVCache
    slots: Int[Array, "prompts width"]
    tokens: Int[Array, "prompts width max_new_tokens"]
    log_probs: Float[Array, "prompts width"]
    num_generated: Int[Array, " prompts"]
    limits: Int[Array, " prompts"]
    pool_tokens: Int[Array, "prompts width max_new_tokens"]
    pool_scores: Float[Array, "prompts width"]
    finish: Int[Array, " prompts"]
    length_penalty: Float[Array, ""]
    step: Int[Array, ""]
    peak_unshared: Int[Array, ""]
    stop_tokens: Int[Array, " stops"]
    early_stopping: Int[Array, ""]

    @property
    def running(self) -> Bool[Array, " prompts"]:
        """Prompts whose search goes on."""
        return self.finish == Finish.RUNNING

    @property
    def alive(self) -> Bool[Array, "prompts width"]:
        """Beams that go on."""
        return self.running[:, None] & (self.log_probs > -jnp.inf)


class _Candidates(NamedTuple):
    """Continuations of a prompt's beams by one token, best first."""

    beam: Int[Array, "prompts candidates"]
    tokens: Int[Array, "prompts candidates max_new_tokens"]
    log_probs: Float[Array, "prompts candidates"]
    ends: Bool[Array, "prompts candidates"]  # with this token


def start(
    cache: KVCache,
    slots: Int[Array, "prompts width"],
    logits: Float[Array, "prompts vocab"],
    limits: Int[Array, " prompts"],
    *,
    max_new_tokens: int,
    stop_tokens: Int[Array, " stops"],
    length_penalty: Float[Array, ""] | float = 1.0,
    early_stopping: Int[Array, ""] | EarlyStopping = EarlyStopping.FALSE,
) -> Beams:
    """The initial state: each prompt's first tokens are chosen, and its beams share its pages.

    Args:
      cache: the cache with each prompt in the first of its slots; its other slots are empty.
      slots: of each prompt's beams.
      logits: after each prompt's last token.
      limits: most new tokens of each prompt's sequences, from 1 to `max_new_tokens`.
      max_new_tokens: static; most new tokens of any sequence.
      stop_tokens: ids that end a sequence; there may be none.
      length_penalty: exponent of the length in scores.
      early_stopping: when the search of a prompt ends.
    """
    prompts, width = slots.shape
    zeros = jnp.zeros(prompts, jnp.int32)
    no_tokens = jnp.full((prompts, width, max_new_tokens), -1, jnp.int32)
    none = jnp.full((prompts, width), -jnp.inf, jnp.float32)
    # The newest token of a sequence takes no token slot.
    room = cache.config.max_tokens_per_seq + 1 - rows_of(cache.table.positions, slots[:, 0])
    state = Beams(
        cache=cache,
        slots=slots,
        tokens=no_tokens,
        log_probs=none.at[:, 0].set(0.0),
        num_generated=zeros,
        limits=jnp.minimum(limits, room),
        pool_tokens=no_tokens,
        pool_scores=none,
        finish=zeros,
        length_penalty=jnp.asarray(length_penalty, jnp.float32),
        step=jnp.zeros((), jnp.int32),
        peak_unshared=pages_unshared(cache),
        stop_tokens=stop_tokens,
        early_stopping=jnp.asarray(early_stopping, jnp.int32),
    )
    every, logits = jnp.ones(prompts, bool), jnp.repeat(logits, width, axis=0)
    return _advance(state, logits, ran=every, stuck=~every, undone=~every[:, None] & state.alive)


def search(model: CausalLM, state: Beams, until: Int[Array, ""] | int) -> Beams:
    """Searches until every prompt has ended or `until` steps are taken, in one `lax.while_loop`.

    A step runs each beam's newest token and lets every beam continue the one that it was chosen from
    (`reorder`). A prompt that ends releases its pages at once. A prompt of which a beam finds no free page
    waits: the step is undone for all its beams. When every prompt is waiting, the last of them ends with
    `OUT_OF_PAGES`, and its beams as they are count as ended sequences.

    Args:
      model: the model.
      state: the state so far.
      until: total steps after which to return; may be traced.

    Raises:
      ValueError: at trace time, for a model whose results do not match `CausalLM`.
    """

    def unfinished(state: Beams):
        return (state.step < until) & jnp.any(state.running)

    return control_flow.while_loop(unfinished, lambda state: _step(model, state), state)


def _step(model: CausalLM, state: Beams) -> Beams:
    alive, shape = state.alive, state.slots.shape
    seqs = jnp.where(alive, state.slots, -1).reshape(-1)
    cache, batch = allocate(tidied(state.cache), seqs, jnp.ones_like(seqs))
    newest = jnp.take_along_axis(state.tokens, (state.num_generated - 1)[:, None, None], axis=2)
    num_copies = state.cache.stats.copy_on_write_copies, cache.stats.copy_on_write_copies
    peak = jnp.maximum(state.peak_unshared, pages_unshared(cache))
    logits, cache = run_model(model, jnp.maximum(newest, 0).reshape(-1), cache, batch)

    granted = alive & (batch.status == Status.OK).reshape(shape)
    ran = state.running & jnp.all(granted == alive, axis=1)
    # A beam that was granted a copy of a shared page leaves the page to the others, who may need no copy.
    stuck = state.running & ~jnp.any(ran) & (num_copies[0] == num_copies[1])
    number = jnp.arange(shape[0], dtype=jnp.int32)
    stuck = stuck & (number == jnp.max(jnp.where(state.running, number, -1)))
    state = replace(state, cache=cache, step=state.step + 1, peak_unshared=peak)
    return _advance(state, logits, ran, stuck, granted & ~ran[:, None])


def _advance(
    state: Beams,
    logits: Float[Array, "beams vocab"],
    ran: Bool[Array, " prompts"],
    stuck: Bool[Array, " prompts"],
    undone: Bool[Array, "prompts width"],
) -> Beams:
    """Chooses the next beams and pools of prompts that ran, and ends prompts that are stuck.

    The newest token of the beams that are `undone` leaves the cache again.
    """
    width = state.slots.shape[1]
    found = _continuations(state, logits)
    num_generated = state.num_generated + ran.astype(jnp.int32)
    state = replace(_pooled(state, found, ran, stuck), num_generated=num_generated)

    log_probs, chosen = lax.top_k(jnp.where(found.ends, -jnp.inf, found.log_probs), width)
    log_probs = jnp.where(ran[:, None], log_probs, state.log_probs)
    of_beam = _take(found.beam, chosen)
    tokens = _take(found.tokens, chosen[:, :, None])
    ended = ran & _is_over(state, log_probs[:, 0])
    at_limit = num_generated >= state.limits
    reason = jnp.where(at_limit, Finish.LENGTH, Finish.STOP).astype(jnp.int32)
    finish = jnp.where(ended, reason, jnp.where(stuck, Finish.OUT_OF_PAGES, state.finish)).astype(jnp.int32)

    goes_on = (ran & ~ended)[:, None] & (log_probs > -jnp.inf)
    seqs = jnp.where(goes_on, state.slots, -1)
    parents = _take(state.slots, of_beam)
    cache, _ = reorder(state.cache, seqs.reshape(-1), parents.reshape(-1))
    released = ran[:, None] & ~goes_on | stuck[:, None]
    lengths = jnp.where(released, 0, rows_of(cache.table.positions, state.slots) - 1)
    seqs = jnp.where(released | undone, state.slots, -1)
    cache, _ = truncate(cache, seqs.reshape(-1), jnp.maximum(lengths, 0).reshape(-1))
    return replace(
        state,
        cache=cache,
        tokens=jnp.where(ran[:, None, None], tokens, state.tokens),
        log_probs=log_probs,
        finish=finish,
    )


def _continuations(state: Beams, logits: Float[Array, "beams vocab"]) -> _Candidates:
    """The best continuations, so many that `width` remain when every other one ends with a stop token."""
    (prompts, width), vocab = state.slots.shape, logits.shape[1]
    count = min(width * max(2, 1 + state.stop_tokens.shape[0]), width * vocab)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).reshape(prompts, width, vocab)
    sums = state.log_probs[:, :, None] + log_probs
    sums = jnp.where(jnp.isnan(sums), -jnp.inf, sums).reshape(prompts, width * vocab)
    sums, index = largest(sums, count)
    beam, token = index // vocab, index % vocab
    column = jnp.arange(state.tokens.shape[2], dtype=jnp.int32)[None, None]
    tokens = _take(state.tokens, beam[:, :, None])
    tokens = jnp.where(column == state.num_generated[:, None, None], token[:, :, None], tokens)
    full = state.num_generated + 1 >= state.limits
    ends = jnp.isin(token, state.stop_tokens) | full[:, None]
    return _Candidates(beam, tokens, sums, ends)


def _pooled(state: Beams, found: _Candidates, ran: Bool[Array, " prompts"], stuck: Array) -> Beams:
    """The best of the pool and of what ends now: of the first `width` candidates, or all beams if stuck."""
    width = state.slots.shape[1]
    now = stuck[:, None]
    ends = now | ran[:, None] & found.ends[:, :width]
    length = state.num_generated + jnp.where(stuck, 0, 1)
    sums = jnp.where(now, state.log_probs, found.log_probs[:, :width])
    scores = jnp.where(ends, _score(sums, length[:, None], state.length_penalty), -jnp.inf)
    tokens = jnp.where(now[:, :, None], state.tokens, found.tokens[:, :width])
    best, chosen = lax.top_k(jnp.concatenate([state.pool_scores, scores], axis=1), width)
    return replace(
        state,
        pool_tokens=_take(jnp.concatenate([state.pool_tokens, tokens], axis=1), chosen[:, :, None]),
        pool_scores=best,
    )


def _take(values: Array, index: Array) -> Array:
    return jnp.take_along_axis(values, index, axis=1)


def _is_over(state: Beams, best: Float[Array, " prompts"]) -> Bool[Array, " prompts"]:
    """Whether beams whose best sum is this are of no more use to the pool."""
    to_come = (state.early_stopping == EarlyStopping.NEVER) & (state.length_penalty > 0)
    length = jnp.where(to_come, state.limits, state.num_generated)
    worst = state.pool_scores[:, -1]
    is_full = worst > -jnp.inf
    over = ~(_score(best, length, state.length_penalty) > worst)
    return over | is_full & (state.early_stopping == EarlyStopping.TRUE)


def _score(log_probs: Array, lengths: Array, length_penalty: Array) -> Array:
    return log_probs / jnp.maximum(lengths, 1).astype(jnp.float32) ** length_penalty
