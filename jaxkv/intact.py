"""How many leading token slots of a sequence are as they were written: a prefix is recorded of these only."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.entries import rows_of
from jaxkv.state import PrefixIndex

NEVER_TOUCHED = 2**31 - 1


def limit_intact(
    index: PrefixIndex | None, slot: Int[Array, " entries"], length: Int[Array, " entries"]
) -> PrefixIndex | None:
    """Notes that of these sequences no more than so many leading token slots are as they were."""
    if index is None:
        return None
    return replace(index, intact=index.intact.at[slot].min(length, mode="drop"))


def inherit_intact(
    index: PrefixIndex | None, parent: Int[Array, " entries"], child: Int[Array, " entries"]
) -> PrefixIndex | None:
    """Each child's sequence is its parent's, read as before the call."""
    if index is None:
        return None
    return replace(index, intact=index.intact.at[child].set(rows_of(index.intact, parent), mode="drop"))


def cut_intact(
    index: PrefixIndex | None, slot: Int[Array, " entries"], length: Int[Array, " entries"]
) -> PrefixIndex | None:
    """What is left of each sequence is intact if it ends before what was touched."""
    if index is None:
        return None
    whole = length <= rows_of(index.intact, slot)
    to = jnp.where(whole, slot, index.intact.shape[0])
    return replace(index, intact=index.intact.at[to].set(NEVER_TOUCHED, mode="drop"))
