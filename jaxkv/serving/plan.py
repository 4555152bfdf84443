"""Who runs in which slot, and how many tokens each gets in a step."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxkv.entries import DROP, rows_of
from jaxkv.serving.state import RequestTable, ServingState
from jaxkv.state import KVCache


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
    row = jnp.full(slots, rows, jnp.int32).at[table.slots].set(number, **DROP)
    slot = jnp.arange(slots, dtype=jnp.int32)
    lengths, prompts = rows_of(table.lengths, row), rows_of(table.prompt_lengths, row)
    leader = jnp.where(row < rows, rows_of(table.leaders, row), slot)
    waits = leader != slot
    leads = jnp.zeros(slots, bool).at[jnp.where(waits, leader, slots)].set(True, **DROP)
    computed = cache.table.positions
    remaining = jnp.where(leads, jnp.minimum(lengths, prompts), lengths) - computed
    remaining = jnp.where(waits | (row == rows), 0, remaining)
    return Slots(row, lengths, computed, remaining, waits, leader, leads)


def decodes(slots: Slots) -> Bool[Array, " slots"]:
    """Which samples want their next token: all others are in the cache."""
    return (slots.remaining == 1) & (slots.lengths == slots.computed + 1)


def allot(state: ServingState, plan: Plan) -> Plan:
    """The plan with tokens for each slot: decoding ones first, then prompts in order of rank."""
    config, table = state.config, state.requests
    slots = look(state.cache, table)
    decoding = decodes(slots)
    counts = jnp.where(decoding, 1 + plan.num_proposed, 0)
    want = jnp.where(decoding, 0, jnp.minimum(slots.remaining, config.most_at_once))
    order = by_rank(table, slots.row)
    sorted_want = want[order]
    before = jnp.cumsum(sorted_want, dtype=jnp.int32) - sorted_want
    left = config.token_budget - jnp.sum(counts, dtype=jnp.int32)
    return plan._replace(counts=counts.at[order].add(jnp.clip(left - before, 0, sorted_want)))


def by_rank(table: RequestTable, row: Int[Array, "..."]) -> Int[Array, "..."]:
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


def with_tokens(counts: Int[Array, " slots"]) -> Int[Array, " slots"]:
    """Each slot's number; past the end where it has no tokens."""
    slots = counts.shape[0]
    return jnp.where(counts > 0, jnp.arange(slots, dtype=jnp.int32), slots)
