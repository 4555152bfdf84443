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
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxkv.allocation import make_room
from jaxkv.decode import Finish
from jaxkv.entries import rows_of
from jaxkv.granting import read_request
from jaxkv.ownership import num_available
from jaxkv.pages import free
from jaxkv.prefixes import match_prefix, record_prefix
from jaxkv.serving.demand import needs, pages_of, shared_pages
from jaxkv.serving.state import Phase, RequestTable, ServingState
from jaxkv.state import KVCache
from pallas_kernels.control_flow import only_if, while_loop


class Slots(NamedTuple):
    """The samples that run, by their slot; all arrays `[slots]`.

    Attributes:
      row: of the request table, past its end for an empty slot.
      lengths: tokens so far.
      computed: of these in the cache.
      remaining: that the model can run on now: up to the end of the prompt where other samples wait for it.
      waits: whether it waits for the prompt of its request to be computed in another slot, to be forked.
      leader: that slot; its own for a sample that does not wait.
      leads: whether others wait for this one.
    """

    row: Int[Array, " slots"]
    lengths: Int[Array, " slots"]
    computed: Int[Array, " slots"]
    remaining: Int[Array, " slots"]
    waits: Bool[Array, " slots"]
    leader: Int[Array, " slots"]
    leads: Bool[Array, " slots"]


class Plan(NamedTuple):
    """What a step does.

    Attributes:
      counts: tokens of each slot that the model runs on.
      num_proposed: of these the last ones, which are proposals.
      proposed: `[slots, num_tokens]`.
    """

    counts: Int[Array, " slots"]
    num_proposed: Int[Array, " slots"]
    proposed: Int[Array, "slots num_tokens"]


def look(cache: KVCache, table: RequestTable) -> Slots:
    """The running samples by slot."""
    rows, slots = table.phase.shape[0], cache.config.max_seqs
    number = jnp.arange(rows, dtype=jnp.int32)
    row = jnp.full(slots, rows, jnp.int32).at[table.slots].set(number, mode="drop")
    slot = jnp.arange(slots, dtype=jnp.int32)
    lengths, prompts = rows_of(table.lengths, row), rows_of(table.prompt_lengths, row)
    leader = jnp.where(row < rows, rows_of(table.leaders, row), slot)
    waits = leader != slot
    leads = jnp.zeros(slots, bool).at[jnp.where(waits, leader, slots)].set(True, mode="drop")
    computed = cache.table.positions
    remaining = jnp.where(leads, jnp.minimum(lengths, prompts), lengths) - computed
    remaining = jnp.where(waits | (row == rows), 0, remaining)
    return Slots(row, lengths, computed, remaining, waits, leader, leads)


def schedule(state: ServingState) -> tuple[ServingState, Plan]:
    """Preempts, ends and admits requests, and says what the step runs."""
    config = state.config
    state, proposed, num_proposed = _propose(state)
    if config.policy is not None or config.cache.layer_windows is not None:
        state = replace(state, cache=_drop_what_is_due(state, num_proposed))

    def lacks_pages(carry: tuple[ServingState, Array]) -> Bool[Array, ""]:
        state, num_proposed = carry
        slots = look(state.cache, state.requests)
        counts = _allot(state, slots, num_proposed)
        short = jnp.sum(needs(state.cache, _own(counts), counts)) > num_available(state.cache.table)
        return short | state.short

    def yield_pages(carry: tuple[ServingState, Array]) -> tuple[ServingState, Array]:
        state, num_proposed = carry
        speculates = jnp.any(num_proposed > 0)
        state = _end_or_preempt_last(state, ~speculates)
        return replace(state, short=jnp.zeros((), bool)), jnp.zeros_like(num_proposed)

    state, num_proposed = while_loop(lacks_pages, yield_pages, (state, num_proposed))
    waiting = jnp.any(state.requests.phase == Phase.WAITING)
    has_slot = jnp.any(look(state.cache, state.requests).row == config.max_requests)
    state = only_if(waiting & has_slot, partial(_admit, num_proposed=num_proposed), state)
    slots = look(state.cache, state.requests)
    return state, Plan(_allot(state, slots, num_proposed), num_proposed, proposed)


def _own(counts: Int[Array, " slots"]) -> Int[Array, " slots"]:
    """Each slot's number; past the end where it has no tokens."""
    slots = counts.shape[0]
    return jnp.where(counts > 0, jnp.arange(slots, dtype=jnp.int32), slots)


def _decodes(slots: Slots) -> Bool[Array, " slots"]:
    return (slots.remaining == 1) & (slots.lengths == slots.computed + 1)


def _propose(state: ServingState) -> tuple[ServingState, Array, Array]:
    """Proposed tokens of the samples that decode, and how many: no more than they may still have."""
    drafter, config, table = state.config.speculate, state.config, state.requests
    slots = look(state.cache, table)
    if drafter is None:
        return state, jnp.zeros((config.cache.max_seqs, 0), jnp.int32), jnp.zeros_like(slots.row)
    # A prompt that others will be forked from must end there.
    lengths = jnp.where(_decodes(slots) & ~slots.leads, slots.lengths, 0)
    drafts, proposed, count = drafter.propose(state.drafts, rows_of(table.tokens, slots.row), lengths)
    most = jnp.minimum(
        rows_of(table.limits, slots.row) - slots.lengths - 1,
        config.cache.max_tokens_per_seq - slots.lengths,
    )
    if config.cache.layer_windows is not None:
        most = jnp.minimum(most, config.cache.max_chunk - 1)
    count = jnp.where(lengths > 0, jnp.clip(count, 0, jnp.maximum(most, 0)), 0)
    return replace(state, drafts=drafts), proposed, count


def _drop_what_is_due(state: ServingState, num_proposed: Array) -> KVCache:
    """What `allocate` would drop first, by a window or a policy, is free before pages are counted."""
    counts = _allot(state, look(state.cache, state.requests), num_proposed)
    seqs = jnp.where(counts > 0, jnp.arange(counts.shape[0], dtype=jnp.int32), -1)
    config = state.config
    return make_room(state.cache, read_request(config.cache, seqs, counts, config.token_budget))[0]


def _allot(state: ServingState, slots: Slots, num_proposed: Array) -> Int[Array, " slots"]:
    """Tokens of each slot: decoding ones first, then prompts in order of rank."""
    config, table = state.config, state.requests
    decodes = _decodes(slots)
    counts = jnp.where(decodes, 1 + num_proposed, 0)
    want = jnp.where(decodes, 0, jnp.minimum(slots.remaining, config.most_at_once))
    order = _by_rank(table, slots.row)
    sorted_want = want[order]
    before = jnp.cumsum(sorted_want, dtype=jnp.int32) - sorted_want
    left = config.token_budget - jnp.sum(counts, dtype=jnp.int32)
    return counts.at[order].add(jnp.clip(left - before, 0, sorted_want))


def _by_rank(table: RequestTable, row: Int[Array, "..."]) -> Int[Array, "..."]:
    """The order of rows: those past the end last, then by priority, arrival and sample."""
    rows = table.phase.shape[0]
    keys = (
        (row >= rows).astype(jnp.int32),
        # ~priority: unlike -priority, never overflows.
        ~rows_of(table.priorities, row),
        rows_of(table.arrivals, row),
        rows_of(table.samples, row),
        jnp.arange(row.shape[0], dtype=jnp.int32),
    )
    return lax.sort(keys, num_keys=4)[-1]


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
    return jnp.zeros(count, bool).at[slots].set(True, mode="drop")


def record(cache: KVCache, table: RequestTable, slots: Slots, which: Bool[Array, " slots"]) -> KVCache:
    """Makes what these slots hold findable, with a prefix cache."""
    if not cache.config.prefix_cache:
        return cache
    seqs = jnp.where(which & ~slots.waits, jnp.arange(which.shape[0], dtype=jnp.int32), -1)

    def record_texts(cache: KVCache) -> KVCache:
        tokens, salts = rows_of(table.tokens, slots.row), rows_of(table.salts, slots.row)
        return record_prefix(cache, seqs, tokens, cache.table.positions, salt=salts)

    return only_if(jnp.any(seqs >= 0), record_texts, cache)


def _admit(state: ServingState, num_proposed: Array) -> ServingState:
    """Gives slots to waiting requests, in order of rank, up to the first that does not fit."""
    config, table = state.config, state.requests
    rows, none = config.max_requests, config.cache.max_seqs
    slots = look(state.cache, table)
    left = config.token_budget - jnp.sum(_allot(state, slots, num_proposed), dtype=jnp.int32)
    occupied = slots.row < rows
    number = jnp.arange(rows, dtype=jnp.int32)
    row = _by_rank(table, jnp.where(table.phase == Phase.WAITING, number, rows))
    waiting = rows_of(table.phase, row) == Phase.WAITING
    first, leader, last = _bounds(jnp.where(waiting, table.arrivals[row], -1 - number))
    lengths, prompts = table.lengths[row], table.prompt_lengths[row]
    pages = pages_of(lengths, config) + 1 - jnp.where(first, 0, shared_pages(prompts, config))
    tokens = jnp.where(first, lengths, lengths - prompts)
    pages, tokens = (
        jnp.where(waiting, jnp.minimum(of, most + 1), 0)
        for of, most in ((pages, config.cache.num_pages), (tokens, config.token_budget))
    )
    page_ends, token_ends = (jnp.cumsum(of, dtype=jnp.int32) for of in (pages, tokens))
    room = num_available(state.cache.table) - _reserved(state, slots, num_proposed)
    fits = (page_ends[last] <= room) | (~jnp.any(occupied) & (leader == 0))
    fits &= last < none - jnp.sum(occupied, dtype=jnp.int32)
    fits &= (token_ends - tokens)[leader] < left
    return _enter(state, row, fits & waiting, leader, jnp.argsort(occupied, stable=True), last > leader)


def _bounds(request: Int[Array, " rows"]) -> tuple[Array, Array, Array]:
    """Of rows that stand together by request: whether each is the first, and where the first and last are."""
    number = jnp.arange(request.shape[0], dtype=jnp.int32)
    changes = request[1:] != request[:-1]
    edge = jnp.ones(1, bool)
    first, last = jnp.concatenate([edge, changes]), jnp.concatenate([changes, edge])
    begin = lax.cummax(jnp.where(first, number, 0))
    end = lax.cummin(jnp.where(last, number, number[-1]), reverse=True)
    return first, begin, end


def _reserved(state: ServingState, slots: Slots, num_proposed: Array) -> Int[Array, ""]:
    """Pages that running samples will take for the tokens they have and those proposed."""
    config, table = state.config, state.requests
    prompts = rows_of(table.prompt_lengths, slots.row)
    ends = slots.lengths + num_proposed
    known = jnp.where(slots.waits | (slots.row == config.max_requests), 0, ends - slots.computed)
    whole = pages_of(ends, config)
    forked = jnp.where(slots.waits, whole - shared_pages(prompts, config), 0)
    return jnp.sum(jnp.minimum(needs(state.cache, _own(known), known), whole) + forked, dtype=jnp.int32)


def _enter(state: ServingState, row, admitted, leader, free_slots, several) -> ServingState:
    """Admitted rows in their slots; what their prompts begin with comes from the prefix cache.

    Args:
      state: the server.
      row: rows by rank.
      admitted: of these the ones that run now, all before the others.
      leader: where in `row` the first sample of each one's request stands.
      free_slots: slots, the empty ones first.
      several: whether the request has several samples.
    """
    config, table, cache = state.config, state.requests, state.cache
    most = min(free_slots.shape[0], row.shape[0])
    row, admitted, leader, several = (of[:most] for of in (row, admitted, leader, several))
    slot = free_slots[:most].astype(jnp.int32)
    leaders = slot[jnp.minimum(leader, most - 1)]
    at = jnp.where(admitted, row, config.max_requests)
    matched = jnp.zeros((), jnp.int32)
    if cache.config.prefix_cache:
        # Where others wait to be forked from the prompt, no more than the prompt.
        asked = jnp.where(several, table.prompt_lengths[row], table.lengths[row])
        seqs = jnp.where(admitted & (leaders == slot), slot, -1)
        cache, found = match_prefix(cache, seqs, table.tokens[row], asked, salt=table.salts[row])
        matched = jnp.sum(found, dtype=jnp.int32)
    table = replace(
        table,
        phase=table.phase.at[at].set(Phase.RUNNING, mode="drop"),
        slots=table.slots.at[at].set(slot, mode="drop"),
        leaders=table.leaders.at[at].set(leaders, mode="drop"),
    )
    stats = state.stats.plus(admissions=jnp.sum(admitted, dtype=jnp.int32), matched_tokens=matched)
    return replace(state, cache=cache, requests=table, stats=stats)
