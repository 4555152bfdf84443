"""The compiled loop of a server: schedule, run the model, draw tokens, end what is finished."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.allocation import allocate
from jaxkv.causal_lm import CausalLM, run_model
from jaxkv.decode import Finish
from jaxkv.entries import DROP, rows_of
from jaxkv.eviction import evict
from jaxkv.forking import fork
from jaxkv.pages import truncate
from jaxkv.prefill import tidied
from jaxkv.serving.drawing import Drawn, LogitsFn, draw
from jaxkv.serving.plan import Plan, Slots, look
from jaxkv.serving.scheduling import record, schedule
from jaxkv.serving.state import Phase, RequestTable, ServingState
from jaxkv.serving.submitting import finish_rows
from jaxkv.state import Batch, KVCache, Status
from pallas_kernels.control_flow import only_if, while_loop
from pallas_kernels.ragged import ragged_rows


def run(
    model: CausalLM, state: ServingState, until: Int[Array, ""] | int, *, logits_fn: LogitsFn | None = None
) -> ServingState:
    """Serves until step `until`, counted from `init`, or until no request waits or runs.

    Samples that decode get their next token in every step, or several with `ServingConfig.speculate`; prompts
    are prefilled in chunks beside them. A sample ends with STOP at a stop token, which is its last; with
    LENGTH at its limit, or when its row of the page table is full; with OUT_OF_PAGES if its request runs
    alone and the pool is used up. What a request gets depends on nothing else in the batch, up to the
    rounding of logits: draw n of sample s uses `fold_in(fold_in(key(seed), s), n)`.

    Requests rank by priority, then arrival. Every step gives the first-ranked running request a token at
    least, and it is never preempted; so a request with k requests ranking above it, none of which arrives
    later, starts after at most `(k + max_seqs) * max_tokens` steps.

    Args:
      model: the model.
      state: the server.
      until: the step to stop at; may be traced.
      logits_fn: static; changes logits before a token is chosen: penalties, biases, grammars. Called with
        float32 logits `[rows, vocab]`, the texts so far `[rows, max_tokens]`, their lengths and the requests'
        ids, both `[rows]`; returns logits. A row of length 0 is padding.

    Returns:
      The server after the last step.

    Raises:
      ValueError: at trace time, for a model whose results do not match `CausalLM`.

    Example:
      >>> import jax, jaxkv
      >>> from jaxkv import serving
      >>> from jaxkv.models import ModelConfig, random_model
      >>> model = random_model(ModelConfig(vocab_size=16, hidden_size=8, num_layers=1, num_q_heads=1,
      ...     num_kv_heads=1, head_dim=8, intermediate_size=8, max_context=64), jax.random.key(0))
      >>> config = serving.ServingConfig(model.cache_config(num_pages=8, max_seqs=2), token_budget=8)
      >>> requests = [serving.Request(id=7, tokens=[1, 2, 3], max_new_tokens=5)]
      >>> state, status = serving.submit(serving.init(config), serving.Requests.of(requests, config))
      >>> state, events = serving.take(jax.jit(serving.run)(model, state, 100))
      >>> int(events.ids[0]), int(events.counts[0]), jaxkv.Finish(int(events.finish[0])).name
      (7, 5, 'LENGTH')
    """
    vocab = vocabulary(model, state)

    def goes_on(state: ServingState) -> Bool[Array, ""]:
        phase = state.requests.phase
        # By the difference: the count of steps wraps around.
        left = jnp.asarray(until, jnp.int32) - state.stats.steps
        return (left > 0) & jnp.any((phase == Phase.WAITING) | (phase == Phase.RUNNING))

    def step(state: ServingState) -> ServingState:
        state = replace(state, stats=state.stats.plus(steps=jnp.ones((), jnp.int32)))
        state, plan = schedule(state)
        return _advance(*_computed(model, state, plan, vocab), plan, logits_fn)

    return while_loop(goes_on, step, state)


def vocabulary(model: CausalLM, state: ServingState) -> int:
    """Tokens of the model's vocabulary; nothing is computed.

    Raises:
      ValueError: for a model whose results do not match `CausalLM`. Asked for one row more than there are
        tokens, the shape of its logits shows whether it ignores `rows`.
    """

    def one(cache: KVCache) -> Array:
        slots = jnp.arange(cache.config.max_seqs, dtype=jnp.int32)
        cache, batch = allocate(cache, slots, jnp.ones_like(slots))
        rows = jnp.zeros(slots.shape[0] + 1, jnp.int32)
        return run_model(model, jnp.zeros_like(slots), cache, batch, rows)[0]

    return jax.eval_shape(one, state.cache).shape[1]


class Computed(NamedTuple):
    """What the model returned of a step.

    Attributes:
      status: of each slot, what `allocate` said.
      logits: those that choose each slot's next tokens.
    """

    status: Int[Array, " slots"]
    logits: Float[Array, "draws vocab"]


def _computed(
    model: CausalLM, state: ServingState, plan: Plan, vocab: int
) -> tuple[ServingState, Slots, Computed]:
    """Runs the model in the first of the compiled widths that holds the step's tokens."""
    slots = look(state.cache, state.requests)
    seqs = jnp.where(plan.counts > 0, jnp.arange(plan.counts.shape[0], dtype=jnp.int32), -1)
    draws = plan.counts.shape[0] * (1 + plan.proposed.shape[1])
    cache, batch = allocate(tidied(state.cache), seqs, plan.counts, total_tokens=state.config.token_budget)
    carry = cache, jnp.zeros((draws, vocab), jnp.float32)
    total, least = jnp.sum(plan.counts, dtype=jnp.int32), 0

    def compute(carry: tuple[KVCache, Array], width: int) -> tuple[KVCache, Array]:
        tokens, of = _tokens(state.requests, slots, plan, width), _narrowed(batch, width)
        logits, cache = run_model(model, tokens, carry[0], of, _logit_rows(of, slots, plan).reshape(-1))
        return cache, logits.astype(jnp.float32)

    # Loops of one trip or none: the branches of a `cond` would each have a pool of their own on a GPU.
    for width in state.config.widths:
        carry = only_if((total > least) & (total <= width), partial(compute, width=width), carry)
        least = width
    return replace(state, cache=carry[0]), slots, Computed(batch.status, carry[1])


def _narrowed(batch: Batch, width: int) -> Batch:
    """The batch with a token axis of `width`, which holds all of its tokens."""
    return replace(
        batch,
        query_starts=jnp.minimum(batch.query_starts, width),
        positions=batch.positions[:width],
        page_ids=batch.page_ids[:, :width],
        offsets=batch.offsets[:, :width],
    )


def _advance(
    state: ServingState, slots: Slots, computed: Computed, plan: Plan, logits_fn: LogitsFn | None
) -> ServingState:
    """Draws tokens, takes rejected ones back, and ends what is finished."""
    config, cache, table = state.config, state.cache, state.requests
    ran = (computed.status == Status.OK) & (plan.counts > 0)
    after = slots.computed + plan.counts - plan.num_proposed
    prompts = rows_of(table.prompt_lengths, slots.row)
    child = slots.waits & rows_of(ran & slots.leads & (after == prompts), slots.leader, False)
    cache, table = _fork(cache, table, slots, child)
    draws = (ran & (after == slots.lengths)) | (child & (slots.lengths == prompts))
    drawn = draw(computed.logits, table, slots, plan, draws, config, logits_fn)
    too_long = computed.status == Status.SEQUENCE_TOO_LONG
    drawn = drawn._replace(finish=jnp.where(too_long, Finish.LENGTH, drawn.finish))
    table = _put(table, slots, drawn)
    cache = _take_back(cache, slots, plan, drawn, ran)
    stats = state.stats.plus(
        computed_tokens=jnp.sum(jnp.where(ran, plan.counts, 0), dtype=jnp.int32),
        new_tokens=jnp.sum(drawn.counts, dtype=jnp.int32),
        proposed_tokens=jnp.sum(jnp.where(ran, plan.num_proposed, 0), dtype=jnp.int32),
        accepted_tokens=jnp.sum(jnp.where(plan.num_proposed > 0, drawn.counts - 1, 0), dtype=jnp.int32),
    )
    short = jnp.any(computed.status == Status.OUT_OF_PAGES)
    state = replace(state, cache=cache, requests=table, stats=stats, short=short)
    return _settle(state, slots, plan, drawn.finish, ran)


def _tokens(table: RequestTable, slots: Slots, plan: Plan, width: int) -> Int[Array, " tokens"]:
    """What the model runs on: of each slot the tokens not in the cache yet, then the proposed ones."""
    entry, nth = ragged_rows(jnp.cumsum(plan.counts, dtype=jnp.int32), width)
    row, computed, length = (rows_of(of, entry) for of in (slots.row, slots.computed, slots.lengths))
    known = rows_of(table.tokens, (row, computed + nth))
    if plan.proposed.shape[1] == 0:
        return known
    beyond = computed + nth - length
    proposed = rows_of(plan.proposed, (entry, jnp.maximum(beyond, 0)))
    return jnp.where(beyond < 0, known, proposed)


def _logit_rows(batch: Batch, slots: Slots, plan: Plan) -> Int[Array, "slots new"]:
    """Rows of the token axis whose logits choose each slot's next tokens; its leader's where it waits."""
    last = batch.query_starts[1:] - 1 - plan.num_proposed
    last = last[slots.leader]
    nth = jnp.arange(1 + plan.proposed.shape[1], dtype=jnp.int32)[None]
    return jnp.clip(last[:, None] + jnp.minimum(nth, plan.num_proposed[:, None]), 0)


def _fork(cache: KVCache, table: RequestTable, slots: Slots, child: Array) -> tuple[KVCache, RequestTable]:
    """Samples that waited for their prompt share its pages."""
    slot = jnp.arange(child.shape[0], dtype=jnp.int32)
    parents, children = jnp.where(child, slots.leader, -1), jnp.where(child, slot, -1)
    cache = only_if(jnp.any(child), lambda cache: fork(cache, parents, children)[0], cache)
    row = jnp.where(child, slots.row, table.phase.shape[0])
    return cache, replace(table, leaders=table.leaders.at[row].set(slot, **DROP))


def _put(table: RequestTable, slots: Slots, drawn: Drawn) -> RequestTable:
    """New tokens behind the texts."""
    nth = jnp.arange(drawn.tokens.shape[1], dtype=jnp.int32)[None]
    row = jnp.where(nth < drawn.counts[:, None], slots.row[:, None], table.phase.shape[0])
    at = row, slots.lengths[:, None] + nth
    log_probs = table.log_probs
    if log_probs is not None:
        log_probs = log_probs.at[at].set(drawn.log_probs, **DROP)
    return replace(
        table,
        tokens=table.tokens.at[at].set(drawn.tokens, **DROP),
        lengths=table.lengths.at[slots.row].add(drawn.counts, **DROP),
        log_probs=log_probs,
    )


def _take_back(cache: KVCache, slots: Slots, plan: Plan, drawn: Drawn, ran: Array) -> KVCache:
    """Rejected proposals leave the cache."""
    if plan.proposed.shape[1] == 0:
        return cache
    rejected = ran & (drawn.counts <= plan.num_proposed) & (plan.num_proposed > 0)
    seqs = jnp.where(rejected, jnp.arange(ran.shape[0], dtype=jnp.int32), -1)
    lengths = slots.lengths + drawn.counts - 1
    return only_if(jnp.any(rejected), lambda cache: truncate(cache, seqs, lengths)[0], cache)


def _settle(
    state: ServingState, slots: Slots, plan: Plan, finish: Int[Array, " slots"], ran: Bool[Array, " slots"]
) -> ServingState:
    """Records prompts and finished texts, evicts behind prompts, and ends what is finished."""
    rows = state.requests.phase.shape[0]
    # What waits for a prompt that came to nothing ends with it.
    now = look(state.cache, state.requests)
    finish = jnp.where(now.waits, finish[now.leader], finish)
    ends = (finish != Finish.RUNNING) & (slots.row < rows)
    prompts = ran & (plan.counts - plan.num_proposed > 1)
    cache = record(state.cache, state.requests, now, prompts | ends)
    if state.config.policy is not None:
        seqs = jnp.where(prompts & ~ends, jnp.arange(ends.shape[0], dtype=jnp.int32), -1)
        cache = only_if(jnp.any(seqs >= 0), lambda cache: evict(cache, seqs)[0], cache)
    of_rows = jnp.full(rows, Finish.RUNNING, jnp.int32).at[slots.row].set(finish, **DROP)
    state = replace(state, cache=cache)
    return finish_rows(state, of_rows != Finish.RUNNING, of_rows)
