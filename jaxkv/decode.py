"""Text generation after `prefill`, as pure functions for the caller's `jit`: start, decode, end."""

from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxkv.allocation import allocate
from jaxkv.causal_lm import CausalLM as CausalLM
from jaxkv.causal_lm import run_model
from jaxkv.entries import pages_for, rows_of
from jaxkv.pages import free
from jaxkv.prefill import prefill as prefill
from jaxkv.prefill import tidied
from jaxkv.prefixes import record_prefix
from jaxkv.sampling import Sampling, SamplingBatch, sample_each
from jaxkv.state import KVCache, Status
from pallas_kernels import control_flow
from pallas_kernels.control_flow import only_if


class Finish(IntEnum):
    """Why a sequence ended.

    Attributes:
      RUNNING: it has not.
      STOP: at a stop token, a stop string, or because `on_tokens` said so.
      LENGTH: at its limit, or its row of the page table is full.
      OUT_OF_PAGES: no page was free for its next token.
      CANCELLED: by `jaxkv.serving.cancel`.
      REFUSED: it never began; `jaxkv.serving.Event.error` says why.
    """

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    OUT_OF_PAGES = 3
    CANCELLED = 4
    REFUSED = 5


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Decoding:
    """The state of a decode loop.

    Attributes:
      cache: the cache.
      seqs: slot of each sequence.
      next_tokens: the newest token of each, not yet in the cache.
      output: tokens generated so far.
      num_generated: number of tokens generated so far.
      limits: most tokens to generate.
      finish: a `Finish` for each.
      key: for sampling.
      step: steps taken.
      peak_unshared: most pages that the sequences would have used at once without sharing.
      logits: the logits from which each output token was drawn, or None if they are not kept.
      keep: whether sequences stay in the cache when they end.
      prompts: tokens that the cache held of each at the start, to record it when it ends; None if nothing is
        recorded.
      prompt_lengths: how many; 0 for a sequence that is not recorded.
    """

    cache: KVCache
    seqs: Int[Array, " seqs"]
    next_tokens: Int[Array, " seqs"]
    output: Int[Array, "seqs max_new_tokens"]
    num_generated: Int[Array, " seqs"]
    limits: Int[Array, " seqs"]
    finish: Int[Array, " seqs"]
    key: PRNGKeyArray
    step: Int[Array, ""]
    peak_unshared: Int[Array, ""]
    logits: Float[Array, "seqs max_new_tokens vocab"] | None = None
    keep: bool = field(default=False, metadata={"static": True})
    prompts: Int[Array, "seqs width"] | None = None
    prompt_lengths: Int[Array, " seqs"] | None = None


def decode(
    model: CausalLM,
    state: Decoding,
    until: Int[Array, ""] | int,
    *,
    sampling: Sampling | SamplingBatch,
    stop_tokens: tuple[int, ...] = (),
) -> Decoding:
    """Decodes until every sequence has finished or `until` steps are taken, in one `lax.while_loop`.

    A sequence that finishes releases its pages at once, unless `state.keep`. A sequence that finds no free
    page waits for one; when all are waiting, the last of them ends with `OUT_OF_PAGES` to free its pages.
    With `CacheConfig.compact_automatically` a step begins with `maybe_compact`.

    Args:
      model: the model.
      state: the state so far.
      until: total steps after which to return; may be traced, so that all blocks share one program.
      sampling: how tokens are chosen, for all sequences or for each.
      stop_tokens: ids that end a sequence.

    Returns:
      The state after the last step.

    Raises:
      ValueError: at trace time, for a model whose results do not match `CausalLM`.
    """

    def unfinished(state: Decoding):
        return (state.step < until) & jnp.any(state.finish == Finish.RUNNING)

    step = partial(_decode_step, model, sampling=sampling, stop_tokens=stop_tokens)
    return control_flow.while_loop(unfinished, step, state)


def _decode_step(
    model, state: Decoding, *, sampling: Sampling | SamplingBatch, stop_tokens: tuple[int, ...]
) -> Decoding:
    running = state.finish == Finish.RUNNING
    seqs = jnp.where(running, state.seqs, -1)
    cache, batch = allocate(tidied(state.cache), seqs, jnp.ones_like(seqs))
    once = cache.policy is not None and cache.policy.rule.once
    logits, cache = run_model(model, state.next_tokens, cache, batch, observed=not once)
    peak = jnp.maximum(state.peak_unshared, pages_unshared(cache))
    state = replace(state, cache=cache, step=state.step + 1, peak_unshared=peak)
    return _take(state, logits, running, batch.status, sampling, stop_tokens)


def _take(state: Decoding, logits, running: Bool[Array, " seqs"], status, sampling, stop_tokens) -> Decoding:
    """Draws and records a token for each sequence that ran, and releases the finished ones."""
    ran = running & (status == Status.OK)
    entry = jnp.arange(state.seqs.shape[0], dtype=jnp.int32)
    logits = logits.astype(jnp.float32)
    tokens = sample_each(_draw_keys(state, entry), logits, sampling)
    column = jnp.where(ran, state.num_generated, state.output.shape[1])
    num_generated = state.num_generated + ran.astype(jnp.int32)

    stopped = ran & jnp.isin(tokens, jnp.asarray(stop_tokens, jnp.int32))
    full = (num_generated >= state.limits) | (status == Status.SEQUENCE_TOO_LONG)
    waiting = running & (status == Status.OUT_OF_PAGES)
    stuck = waiting & (entry == jnp.max(jnp.where(waiting, entry, -1))) & ~jnp.any(ran)
    finish = jnp.select(
        [stopped, running & full, stuck], [Finish.STOP, Finish.LENGTH, Finish.OUT_OF_PAGES], state.finish
    ).astype(jnp.int32)
    ended = running & (finish != Finish.RUNNING)
    return replace(
        state,
        cache=_release(state, ended),
        next_tokens=jnp.where(ran, tokens, state.next_tokens),
        output=state.output.at[entry, column].set(tokens, mode="drop"),
        num_generated=num_generated,
        finish=finish,
        logits=None if state.logits is None else state.logits.at[entry, column].set(logits, mode="drop"),
    )


def end(state: Decoding, ends: Bool[Array, " seqs"]) -> Decoding:
    """Ends sequences with `Finish.STOP`, and frees their pages unless `state.keep`.

    A sequence that had already ended keeps its tokens; its reason becomes `STOP`.

    Args:
      state: the state between two steps.
      ends: which sequences to end.
    """
    finish = jnp.where(ends, Finish.STOP, state.finish).astype(jnp.int32)
    return replace(state, cache=_release(state, ends), finish=finish)


def _release(state: Decoding, ended: Bool[Array, " seqs"]) -> KVCache:
    seqs = jnp.where(ended, state.seqs, -1)
    cache = state.cache
    if state.prompts is not None:
        cache = only_if(jnp.any(ended), lambda cache: _recorded(cache, state, seqs), cache)
    return cache if state.keep else free(cache, seqs)


def _recorded(cache: KVCache, state: Decoding, seqs: Int[Array, " seqs"]) -> KVCache:
    """The cache that finds the texts of these sequences again."""
    assert state.prompts is not None and state.prompt_lengths is not None
    begin, width = state.prompt_lengths[:, None], state.prompts.shape[1] + state.output.shape[1]
    column = jnp.arange(width, dtype=jnp.int32)[None]
    entry = jnp.arange(seqs.shape[0], dtype=jnp.int32)[:, None]
    new = rows_of(state.output, (entry, jnp.where(column < begin, width, column - begin)))
    tokens = jnp.where(column < begin, rows_of(state.prompts, (entry, column)), new)
    known = state.prompt_lengths > 0
    counts = jnp.where(known, state.prompt_lengths + state.num_generated, 0)
    return record_prefix(cache, seqs, tokens, counts)


def _draw_keys(state: Decoding, entry: Int[Array, " seqs"]) -> PRNGKeyArray:
    """A key for each sequence and token index, so that waiting for a page does not change the draw."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(jax.random.fold_in)(fold(state.key, entry), state.num_generated)


def pages_unshared(cache: KVCache) -> Int[Array, ""]:
    """Pages that the sequences of the cache would use without sharing."""
    config = cache.config
    sizes = jnp.asarray([group.page_size for group in config.groups], jnp.int32)[:, None]
    return jnp.sum(pages_for(cache.table.lengths.reshape(-1, config.max_seqs), sizes), dtype=jnp.int32)


def start(
    cache: KVCache,
    seqs: Int[Array, " seqs"],
    logits: Float[Array, "seqs vocab"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    limits: Int[Array, " seqs"] | None = None,
    sampling: Sampling | SamplingBatch,
    stop_tokens: tuple[int, ...] = (),
    keep_logits: bool = False,
    keep: bool = False,
    prompts: tuple[Int[Array, "seqs width"], Int[Array, " seqs"]] | None = None,
) -> Decoding:
    """The initial state of a decode loop, with each sequence's first token drawn.

    Args:
      cache: the cache with the prompts.
      seqs: slots.
      logits: after each prompt's last token.
      key: for sampling.
      max_new_tokens: most new tokens of any sequence.
      limits: most new tokens of each; a sequence with 0 has ended already. Default: `max_new_tokens`.
      sampling: how tokens are chosen, for all sequences or for each.
      stop_tokens: ids that end a sequence.
      keep_logits: keep the logits of every output token; `seqs * max_new_tokens * vocab` floats.
      keep: leave sequences in the cache when they end, with all their tokens except the newest.
      prompts: the tokens that the cache holds of each, padded, and how many: sequences are recorded when
        they end (`record_prefix`), but for those of 0 tokens. Default: none are.
    """
    num_seqs, vocab = logits.shape
    zeros = jnp.zeros(num_seqs, jnp.int32)
    limits = jnp.full(num_seqs, max_new_tokens, jnp.int32) if limits is None else limits
    wanted = limits > 0
    state = Decoding(
        cache=cache,
        seqs=seqs,
        next_tokens=zeros,
        output=jnp.zeros((num_seqs, max_new_tokens), jnp.int32),
        num_generated=zeros,
        limits=limits,
        finish=jnp.where(wanted, Finish.RUNNING, Finish.LENGTH).astype(jnp.int32),
        key=key,
        step=jnp.zeros((), jnp.int32),
        peak_unshared=pages_unshared(cache),
        logits=jnp.zeros((num_seqs, max_new_tokens, vocab), jnp.float32) if keep_logits else None,
        keep=keep,
        prompts=None if prompts is None else prompts[0],
        prompt_lengths=None if prompts is None else prompts[1],
    )
    state = replace(state, cache=_release(state, ~wanted))
    return _take(state, logits, wanted, zeros, sampling, stop_tokens)
