"""Vectors of entries, one element a sequence of a call: checked, cleaned, and what they read.

An index that should do nothing is out of range (`num_pages`, `max_seqs`): it reads a fill value, and what
is written there is dropped. It is never negative, and JAX is told so: to count those from the end takes an
operation more for each read and write.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxkv.config import CacheConfig
from jaxkv.state import KVCache, PageTable, Status
from pallas_kernels.checks import as_int32

# How values are written: `array.at[index].set(values, **DROP)`.
DROP: dict[str, Any] = dict(mode="drop", wrap_negative_indices=False)


def check_cache(cache: object) -> None:
    """Refuses what is not a cache, such as the pair that most operations return."""
    if not isinstance(cache, KVCache):
        hint = ": it is the first of what allocate returns" if isinstance(cache, tuple) else ""
        raise ValueError(f"cache must be a jaxkv.KVCache, not a {type(cache).__name__}{hint}")


def check_call(cache: object, **vectors: Array) -> list[Array]:
    """As `check_vectors`, of a call on a cache, which is checked too."""
    check_cache(cache)
    return check_vectors(**vectors)


def check_vectors(**vectors: Array) -> list[Array]:
    """int32 vectors of one length, or a `ValueError` naming the argument that is not."""
    arrays = {
        name: vector if isinstance(vector, jax.Array) else np.asarray(vector)
        for name, vector in vectors.items()
    }
    length = None
    for name, array in arrays.items():
        if array.ndim != 1 or array.shape[0] == 0 or not jnp.issubdtype(array.dtype, jnp.integer):
            hint = ": one slot is jnp.array([0])" if array.ndim == 0 else ""
            raise ValueError(
                f"{name} must be a non-empty int32 vector, not {array.dtype}{list(array.shape)}{hint}"
            )
        if length not in (None, array.shape[0]):
            raise ValueError(
                f"{' and '.join(arrays)} must be of one length, not {length} and {array.shape[0]}"
            )
        length = array.shape[0]
    return [as_int32(array) for array in arrays.values()]


def clean_slots(
    seqs: Int[Array, " entries"],
    max_seqs: int,
    *,
    where: Bool[Array, " entries"] | bool = True,
    once: bool = True,
) -> Int[Array, " entries"]:
    """Slots that an operation may use, `max_seqs` for every other entry.

    Args:
      seqs: as the user gave them.
      max_seqs: slots there are; a negative entry and one beyond them are cleaned away.
      where: entries that count; the others are cleaned away first.
      once: whether of the entries that name one slot only the first is left.
    """
    slot = jnp.where(where & (seqs >= 0) & (seqs < max_seqs), seqs, max_seqs)
    if not once:
        return slot
    number = jnp.arange(slot.shape[0], dtype=jnp.int32)
    first = jnp.full(max_seqs, slot.shape[0], jnp.int32).at[slot].min(number, **DROP)
    return jnp.where(rows_of(first, slot, -1) == number, slot, max_seqs)


def table_rows(slot: Int[Array, " entries"], config: CacheConfig) -> Int[Array, "groups entries"]:
    """The rows of the page table of each slot, `num_rows` for a slot of `max_seqs`."""
    if len(config.groups) == 1:
        return slot[None]  # `num_rows` is `max_seqs`
    first = jnp.arange(len(config.groups), dtype=jnp.int32)[:, None] * config.max_seqs
    return jnp.where(slot[None] < config.max_seqs, first + slot[None], config.num_rows)


def lengths_of(table: PageTable, slot: Int[Array, " entries"], config: CacheConfig) -> Int[Array, " entries"]:
    """Token slots in use of each slot in the first group, 0 for a slot of `max_seqs`."""
    return rows_of(table.lengths, table_rows(slot, config)[0])


def full_rows(slot: Int[Array, " entries"], config: CacheConfig) -> Int[Array, " rows"]:
    """Those of groups with full attention, of all slots in one group after the other."""
    full = sum(group.window is None for group in config.groups)
    return table_rows(slot, config)[:full].reshape(-1)


def page_sizes(config: CacheConfig) -> Int[Array, "groups 1"]:
    """Token slots a page of each group."""
    return jnp.asarray([[group.page_size] for group in config.groups], jnp.int32)


def row_page_sizes(config: CacheConfig, entries: int) -> Int[Array, " rows"]:
    """The same for the rows of so many entries in each group, one group after the other."""
    return jnp.repeat(page_sizes(config)[:, 0], entries)


def first_fault(*faults: tuple[Bool[Array, " entries"], Status]) -> Int[Array, " entries"]:
    """A `Status` for each entry: of the first condition that holds for it, else OK."""
    status = jnp.zeros(faults[0][0].shape, jnp.int32)
    for condition, value in reversed(faults):
        status = jnp.where(condition, value, status)
    return status


def rows_of(values: Array, index: Int[Array, "..."] | tuple[Array, ...], fill: int = 0) -> Array:
    """`values[index]`, `fill` where the index is past the end."""
    return values.at[index].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def pages_for(num_tokens: Int[Array, "..."], page_size: int | Int[Array, "..."]) -> Int[Array, "..."]:
    """Pages that hold so many tokens."""
    return (num_tokens + page_size - 1) // page_size
