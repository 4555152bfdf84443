"""Which waiting requests are given slots, and what of their prompts the cache holds already."""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxkv.entries import DROP, rows_of
from jaxkv.ownership import num_available
from jaxkv.prefixes import match_prefix
from jaxkv.serving.demand import needs, pages_of, shared_pages
from jaxkv.serving.plan import Plan, Slots, allot, by_rank, look, with_tokens
from jaxkv.serving.state import Phase, ServingState


def admit(carry: tuple[ServingState, Plan]) -> tuple[ServingState, Plan]:
    """Gives slots to waiting requests, in order of rank, up to the first that does not fit."""
    state, plan = carry
    config, table = state.config, state.requests
    rows, none = config.max_requests, config.cache.max_seqs
    slots = look(state.cache, table)
    left = config.token_budget - jnp.sum(plan.counts, dtype=jnp.int32)
    occupied = slots.row < rows
    number = jnp.arange(rows, dtype=jnp.int32)
    row = by_rank(table, jnp.where(table.phase == Phase.WAITING, number, rows))
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
    room = num_available(state.cache.table) - _reserved(state, slots, plan.num_proposed)
    fits = (page_ends[last] <= room) | (~jnp.any(occupied) & (leader == 0))
    fits &= last < none - jnp.sum(occupied, dtype=jnp.int32)
    fits &= (token_ends - tokens)[leader] < left
    state = _enter(state, row, fits & waiting, leader, jnp.argsort(occupied, stable=True), last > leader)
    return state, allot(state, plan)


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
    return jnp.sum(
        jnp.minimum(needs(state.cache, with_tokens(known), known), whole) + forked, dtype=jnp.int32
    )


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
        phase=table.phase.at[at].set(Phase.RUNNING, **DROP),
        slots=table.slots.at[at].set(slot, **DROP),
        leaders=table.leaders.at[at].set(leaders, **DROP),
    )
    stats = state.stats.plus(admissions=jnp.sum(admitted, dtype=jnp.int32), matched_tokens=matched)
    return replace(state, cache=cache, requests=table, stats=stats)
