"""What a server does in a step, decided before the model runs: who is preempted, who is admitted, who gets
how many tokens.

Requests rank by priority, then by arrival.

    1. Each sample that decodes gets its next token and, when speculating, the proposed ones.
    2. Prompts get the rest of the token budget, in order of rank.
    3. While that takes more pages than there are, the proposals go first; then the last-ranked running
       request is preempted: its samples release their pages and wait. The first-ranked is never preempted;
       alone and still out of pages, it ends.
    4. Waiting requests are admitted in order of rank, up to the first that finds too few slots, pages or
       tokens of the budget left. None overtakes it. A request needs pages for all its tokens so far, one more
       for each sample, and all that running prompts will still take; where nothing runs, none.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.allocation import make_room
from jaxkv.decode import Finish
from jaxkv.entries import DROP, rows_of
from jaxkv.granting import read_request
from jaxkv.ownership import num_available
from jaxkv.pages import free
from jaxkv.prefixes import record_prefix
from jaxkv.serving.admitting import admit
from jaxkv.serving.demand import needs
from jaxkv.serving.plan import Plan, Slots, allot, decodes, look, with_tokens
from jaxkv.serving.state import Phase, RequestTable, ServingState
from jaxkv.state import KVCache
from pallas_kernels.control_flow import only_if, while_loop


def schedule(state: ServingState) -> tuple[ServingState, Plan]:
    """Preempts, ends and admits requests, and says what the step runs."""
    config = state.config
    state, plan = _propose(state)
    if config.policy is not None or config.cache.layer_windows is not None:
        state = replace(state, cache=_drop_what_is_due(state, plan))

    def lacks_pages(carry: tuple[ServingState, Plan]) -> Bool[Array, ""]:
        state, plan = carry
        wanted = jnp.sum(needs(state.cache, with_tokens(plan.counts), plan.counts), dtype=jnp.int32)
        return (wanted > num_available(state.cache.table)) | state.short

    def yield_pages(carry: tuple[ServingState, Plan]) -> tuple[ServingState, Plan]:
        state, plan = carry
        speculates = jnp.any(plan.num_proposed > 0)
        state = replace(_end_or_preempt_last(state, ~speculates), short=jnp.zeros((), bool))
        return state, allot(state, plan._replace(num_proposed=jnp.zeros_like(plan.num_proposed)))

    state, plan = while_loop(lacks_pages, yield_pages, (state, plan))
    phase = state.requests.phase
    has_slot = jnp.sum(phase == Phase.RUNNING, dtype=jnp.int32) < config.cache.max_seqs
    return only_if(jnp.any(phase == Phase.WAITING) & has_slot, admit, (state, plan))


def _propose(state: ServingState) -> tuple[ServingState, Plan]:
    """A plan with the proposed tokens of samples that decode: no more than they may still have."""
    drafter, config, table = state.config.speculate, state.config, state.requests
    slots = look(state.cache, table)
    none = jnp.zeros_like(slots.row)
    if drafter is None:
        return state, allot(state, Plan(none, none, jnp.zeros((none.shape[0], 0), jnp.int32)))
    # A prompt that others will be forked from must end there.
    lengths = jnp.where(decodes(slots) & ~slots.leads, slots.lengths, 0)
    drafts, proposed, count = drafter.propose(state.drafts, rows_of(table.tokens, slots.row), lengths)
    most = jnp.minimum(
        rows_of(table.limits, slots.row) - slots.lengths - 1,
        config.cache.max_tokens_per_seq - slots.lengths,
    )
    most = jnp.minimum(most, proposed.shape[1])
    if config.cache.layer_windows is not None:
        most = jnp.minimum(most, config.cache.max_chunk - 1)
    count = jnp.where(lengths > 0, jnp.clip(count, 0, jnp.maximum(most, 0)), 0)
    return replace(state, drafts=drafts), allot(state, Plan(none, count, proposed))


def _drop_what_is_due(state: ServingState, plan: Plan) -> KVCache:
    """What `allocate` would drop first, by a window or a policy, is free before pages are counted."""
    config, slot = state.config, jnp.arange(plan.counts.shape[0], dtype=jnp.int32)
    seqs = jnp.where(plan.counts > 0, slot, -1)
    return make_room(state.cache, read_request(config.cache, seqs, plan.counts, config.token_budget))[0]


def _end_or_preempt_last(state: ServingState, where: Bool[Array, ""]) -> ServingState:
    """Preempts the last-ranked running request; ends it if no other runs."""
    table, none = state.requests, state.config.cache.max_seqs
    runs = (table.phase == Phase.RUNNING) & where
    lowest = jnp.min(jnp.where(runs, table.priorities, jnp.iinfo(jnp.int32).max))
    arrival = jnp.max(jnp.where(runs & (table.priorities == lowest), table.arrivals, -1))
    last = runs & (table.arrivals == arrival)
    alone = ~jnp.any(runs & ~last)
    slots = jnp.where(last, table.slots, none)
    cache = record(state.cache, table, look(state.cache, table), _in(slots, none))
    phase = jnp.where(alone, Phase.FINISHED, Phase.WAITING)
    table = replace(
        table,
        phase=jnp.where(last, phase, table.phase).astype(jnp.int32),
        finish=jnp.where(last & alone, Finish.OUT_OF_PAGES, table.finish).astype(jnp.int32),
        slots=jnp.where(last, none, table.slots),
    )
    count = jnp.sum(last, dtype=jnp.int32)
    stats = state.stats.plus(preemptions=jnp.where(alone, 0, count), finished=jnp.where(alone, count, 0))
    return replace(state, cache=free(cache, slots), requests=table, stats=stats)


def _in(slots: Int[Array, " rows"], count: int) -> Bool[Array, " slots"]:
    """Which slots are named."""
    return jnp.zeros(count, bool).at[slots].set(True, **DROP)


def record(cache: KVCache, table: RequestTable, slots: Slots, which: Bool[Array, " slots"]) -> KVCache:
    """Makes what these slots hold findable, with a prefix cache."""
    if not cache.config.prefix_cache:
        return cache
    seqs = jnp.where(which & ~slots.waits, jnp.arange(which.shape[0], dtype=jnp.int32), -1)

    def record_texts(cache: KVCache) -> KVCache:
        tokens, salts = rows_of(table.tokens, slots.row), rows_of(table.salts, slots.row)
        return record_prefix(cache, seqs, tokens, cache.table.positions, salt=salts)

    return only_if(jnp.any(seqs >= 0), record_texts, cache)
