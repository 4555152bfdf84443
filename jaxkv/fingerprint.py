"""Which state of the page table a batch was made for, so that one of another state can do no harm.

    cache, old = allocate(cache, [0], ...)        fingerprint a, in the table and in `old`
    cache = free(cache, [0])                      b
    cache, new = allocate(cache, [1], ...)        c, and `old` is stale: its page belongs to slot 1 now

A counter would not do: two branches of one cache would count alike.
"""

from dataclasses import replace
from enum import IntEnum

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from jaxkv.state import Batch, PageTable

# The two words start from different seeds. The multipliers and shifts are MurmurHash3's finalizer's.
_SEEDS = (0x9E3779B9, 0x7F4A7C15)
_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)


class Operation(IntEnum):
    """What changed a page table."""

    ALLOCATE = 1
    TRUNCATE = 2
    FORK = 3
    DROP_PAGES = 4
    OWN_PAGES = 5
    SHIFT_POSITIONS = 6
    COMPACT = 7
    REORDER = 8
    MATCH_PREFIX = 9


def stamp(
    table: PageTable,
    operation: Operation,
    changed: Bool[Array, " entries"],
    *facts: Int[Array, " entries"],
) -> PageTable:
    """The table with a new fingerprint; with its own where no entry changed anything.

    Args:
      table: after the operation, its fingerprint still that of before.
      operation: what was done.
      changed: which entries of the call had an effect.
      facts: what tells one effect from another, an integer for each entry: slots, counts, page ids.
    """
    words = jnp.asarray([seed + operation for seed in _SEEDS], jnp.uint32)[:, None]
    for fact in facts:
        words = _mix(words + fact.astype(jnp.uint32)[None, :])
    words = jnp.concatenate([words, jnp.ones((1, changed.shape[0]), jnp.uint32)])
    words = jnp.sum(jnp.where(changed[None, :], words, jnp.uint32(0)), axis=1, dtype=jnp.uint32)
    fingerprint = jnp.where(words[2] > 0, _mix(table.fingerprint + words[:2]), table.fingerprint)
    return replace(table, fingerprint=fingerprint)


def is_current(table: PageTable, batch: Batch) -> Bool[Array, ""]:
    """Whether the table is as `allocate` left it when it made the batch."""
    return jnp.all(table.fingerprint == batch.fingerprint)


def _mix(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Every bit of a word changes about half of the result's; no two words become one."""
    words = (words ^ (words >> 16)) * jnp.uint32(_MULTIPLIERS[0])
    words = (words ^ (words >> 13)) * jnp.uint32(_MULTIPLIERS[1])
    return words ^ (words >> 16)
