"""Who owns which page: free, truncate, and how pages come off the stack and go back. No K or V in sight.

The cost of each function follows the batch and its pages, never the size of the pool: pages come
off a stack by rank (a running sum over the batch), and go back to it the same way. An index that
should do nothing is out of range (`num_pages`, `max_seqs`) and dropped.
"""

from dataclasses import replace
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxkv.fingerprint import Operation, stamp
from jaxkv.operation import as_given, operation
from jaxkv.state import AllocationStats, KVCache, PageTable, PolicyState
from pallas_kernels import control_flow
from pallas_kernels.checks import as_int32
from pallas_kernels.ragged import ragged_rows

# Table entries visited at a time by operations on whole rows. Short rows need one visit and no loop.
_CHUNK = 1024
_Amount: TypeAlias = Int[Array, ""] | int


def free(cache: KVCache, seqs: Int[Array, " seqs"]) -> KVCache:
    """Gives the pages of `seqs` back; a page returns to the stack when its last owner lets go.

    Padding, empty slots, slots beyond `max_seqs` and a slot named again are passed over.

    Args:
      cache: the cache.
      seqs: slots.

    Returns:
      The cache, with these slots empty.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([1]))
      >>> int(jaxkv.free(cache, jnp.array([0, 0])).table.num_free)
      2
    """
    (seqs,) = check_vectors(seqs=seqs)
    return truncate(cache, seqs, jnp.zeros_like(seqs))


def truncate(cache: KVCache, seqs: Int[Array, " seqs"], lengths: Int[Array, " seqs"]) -> KVCache:
    """Shortens sequences, as after rejected speculative tokens; pages left empty are given back.

    A longer length than now and a negative one do nothing, nor do padding, empty slots and slots
    beyond `max_seqs`. Of several lengths for one slot the smallest holds.

    Args:
      cache: the cache.
      seqs: slots.
      lengths: token places to keep, one number an entry.

    Returns:
      The cache. Cut to zero, a slot is empty, as after `free`.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2, page_size=4)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([7]), total_tokens=7)
      >>> cache = jaxkv.truncate(cache, jnp.array([0]), jnp.array([3]))
      >>> int(cache.table.lengths[0]), int(cache.table.num_free)
      (3, 1)
    """
    table, stats, policy = _truncate(cache, *check_vectors(seqs=seqs, lengths=lengths))
    return replace(cache, table=table, stats=stats, policy=policy)


@operation(results=lambda cache, *_: as_given((cache.table, cache.stats, cache.policy)))
def _truncate(
    cache: KVCache, seqs: Array, lengths: Array
) -> tuple[PageTable, AllocationStats, PolicyState | None]:
    config, table = cache.config, cache.table
    slot = jnp.where((seqs < 0) | (lengths < 0), config.max_seqs, seqs)
    old = rows_of(table.lengths, slot)
    new_lengths = table.lengths.at[slot].min(lengths, mode="drop")
    new = rows_of(new_lengths, slot)
    once = is_first(slot, config.max_seqs)
    cut = jnp.where(once, old - new, 0)
    kept = pages_for(new, config.page_size)
    ends = jnp.cumsum(jnp.where(once, pages_for(old, config.page_size) - kept, 0), dtype=jnp.int32)

    def give_back(table: PageTable, entry, place):
        row, column = rows_of(slot, entry, config.max_seqs), rows_of(kept, entry) + place
        page = table.pages.at[row, column].get(mode="fill", fill_value=config.num_pages)
        # The row depends on the page that was read: that orders the two, and spares a copy of the table.
        row = jnp.where(page < config.num_pages, row, config.max_seqs)
        pages = table.pages.at[row, column].set(config.num_pages, mode="drop")
        return release_pages(replace(table, pages=pages), page)

    num_free = table.num_free
    table = for_each_page(give_back, table, ends, seqs.shape[0] * config.max_pages_per_seq)
    positions = table.positions.at[slot].add(-cut, mode="drop")
    emptied = jnp.where(new == 0, slot, config.max_seqs)
    table = replace(table, lengths=new_lengths, positions=positions.at[emptied].set(0, mode="drop"))
    table = stamp(table, Operation.TRUNCATE, cut > 0, slot, new)
    policy = cache.policy
    if policy is not None:
        shortened = jnp.where(cut > 0, slot, config.max_seqs)
        policy = replace(policy, values=policy.rule.forget(policy.values, shortened))
    return table, count(cache.stats, num_released=table.num_free - num_free), policy


def release_pages(table: PageTable, page_ids: Int[Array, " entries"]) -> PageTable:
    """One owner lets go of each page named; those that nobody holds go to the stack, once.

    An id of `num_pages` is passed over; a page named twice loses two owners.
    """
    num_pages = table.refcounts.shape[0]
    refcounts = table.refcounts.at[page_ids].add(-1, mode="drop")
    dead = refcounts.at[page_ids].get(mode="fill", fill_value=1) == 0
    # Several entries may name one dead page. They write their numbers, below zero, where its count
    # was; the one that reads its own back pushes the page.
    mark = -1 - jnp.arange(page_ids.shape[0], dtype=jnp.int32)
    refcounts = refcounts.at[jnp.where(dead, page_ids, num_pages)].min(mark, mode="drop")
    pushes = dead & (refcounts.at[page_ids].get(mode="fill", fill_value=0) == mark)
    refcounts = refcounts.at[jnp.where(pushes, page_ids, num_pages)].set(0, mode="drop")
    rank = jnp.cumsum(pushes, dtype=jnp.int32)
    place = jnp.where(pushes, table.num_free + rank - 1, num_pages)
    return replace(
        table,
        refcounts=refcounts,
        free_pages=table.free_pages.at[place].set(page_ids, mode="drop"),
        num_free=table.num_free + rank[-1],
    )


def drop_pages(
    table: PageTable,
    slot: Int[Array, " entries"],
    first: Int[Array, " entries"],
    dropped: Int[Array, " entries"],
    page_size: int,
) -> PageTable:
    """Takes whole pages out of rows; what stands behind them moves up. Lengths follow, positions stay.

        drop 2 from column 1     [s s s s][a b c d][e f g h][i j . .]   ->   [s s s s][i j . .]

    Args:
      table: the page table.
      slot: each slot once; one beyond the table for an entry that does nothing.
      first: column of the first page that goes.
      dropped: how many go, full ones.
      page_size: token places a page.
    """
    num_pages, most = table.refcounts.shape[0], slot.shape[0] * table.pages.shape[1]
    max_seqs = table.lengths.shape[0]
    dropped = jnp.where(slot < max_seqs, dropped, 0)

    def give_back(table: PageTable, entry, place):
        at = rows_of(slot, entry, max_seqs), rows_of(first, entry) + place
        return release_pages(table, rows_of(table.pages, at, num_pages))

    def move_up(table: PageTable, entry, place):
        row, column = rows_of(slot, entry, max_seqs), rows_of(first, entry) + place
        # Past the end of a row stands `num_pages`, which moves up too.
        behind = rows_of(table.pages, (row, column + rows_of(dropped, entry)), num_pages)
        return replace(table, pages=table.pages.at[row, column].set(behind, mode="drop"))

    moved = jnp.where(dropped > 0, pages_for(rows_of(table.lengths, slot), page_size) - first, 0)
    table = for_each_page(give_back, table, jnp.cumsum(dropped, dtype=jnp.int32), most)
    table = for_each_page(move_up, table, jnp.cumsum(moved, dtype=jnp.int32), most)
    table = stamp(table, Operation.DROP_PAGES, dropped > 0, slot, first, dropped)
    return replace(table, lengths=table.lengths.at[slot].add(-dropped * page_size, mode="drop"))


def for_each_page(body, table: PageTable, ends: Int[Array, " entries"], most: int) -> PageTable:
    """Folds `body(table, entry, place)` over the pages of ragged rows, a chunk of them at a time.

    Args:
      body: takes the table and two int32 vectors; `entry` is `len(ends)` for padding.
      table: the page table.
      ends: inclusive running sum of pages an entry.
      most: a static bound of `ends[-1]`. At most one chunk: no loop is compiled.
    """
    size = min(most, _CHUNK)
    if most <= size:
        return body(table, *ragged_rows(ends, size))
    chunks = (ends[-1] + size - 1) // size
    return control_flow.fori_loop(
        0, chunks, lambda chunk, table: body(table, *ragged_rows(ends, size, chunk * size)), table
    )


def for_each_column(body, table: PageTable, num_columns: Int[Array, ""], entries: int) -> PageTable:
    """Folds `body(table, columns)` over the first columns of the table, some at a time.

    In contrast to `for_each_page` all rows are at the same columns at once, so that rows may trade pages.

    Args:
      body: takes the table and an int32 vector of columns; those past the table's last do nothing.
      table: the page table.
      num_columns: how many, counted from the first. At most one step: no loop is compiled.
      entries: rows that the body visits in a column, which say how many columns a step takes.
    """
    most = table.pages.shape[1]
    size = min(most, max(1, _CHUNK // entries))
    columns = jnp.arange(size, dtype=jnp.int32)
    if size == most:
        return body(table, columns)
    steps = (num_columns + size - 1) // size
    return control_flow.fori_loop(0, steps, lambda step, table: body(table, columns + step * size), table)


def rows_of(values: Array, index: Int[Array, "..."] | tuple[Array, ...], fill: int = 0) -> Array:
    """`values[index]`, `fill` where the index is past the end."""
    return values.at[index].get(mode="fill", fill_value=fill)


def is_first(slot: Int[Array, " entries"], max_seqs: int) -> Bool[Array, " entries"]:
    """Whether an entry is the first to name its slot; never for a slot beyond `max_seqs`."""
    number = jnp.arange(slot.shape[0], dtype=jnp.int32)
    first = jnp.full(max_seqs, slot.shape[0], jnp.int32).at[slot].min(number, mode="drop")
    return rows_of(first, slot, -1) == number


def check_vectors(**vectors: Array) -> list[Array]:
    """int32 vectors of one length, or a `ValueError` naming the argument that is not."""
    arrays = {
        name: vector if isinstance(vector, jax.Array) else np.asarray(vector)
        for name, vector in vectors.items()
    }
    length = None
    for name, array in arrays.items():
        if array.ndim != 1 or array.shape[0] == 0 or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be a non-empty int32 vector, not {array.dtype}{list(array.shape)}")
        if length not in (None, array.shape[0]):
            raise ValueError(
                f"{' and '.join(arrays)} must be of one length, not {length} and {array.shape[0]}"
            )
        length = array.shape[0]
    return [as_int32(array) for array in arrays.values()]


def pages_for(num_tokens: Int[Array, " entries"], page_size: int) -> Int[Array, " entries"]:
    return (num_tokens + page_size - 1) // page_size


def count(
    stats: AllocationStats, *, num_taken: _Amount = 0, num_released: _Amount = 0, **others: _Amount
) -> AllocationStats:
    """Adds to the counters; the peak is reached before pages are given back."""
    increments = others | dict(
        total_allocations=num_taken,
        total_deallocations=num_released,
        current_pages=num_taken - num_released,
        peak_pages=jnp.maximum(stats.current_pages + num_taken - stats.peak_pages, 0),
    )
    amounts = jnp.stack([jnp.asarray(increments.get(name, 0), jnp.int32) for name in stats.names()])
    counters = stats.counters + amounts
    # A counter that has grown past the largest int32 stays there instead of turning negative.
    overflow = (amounts > 0) & (counters < stats.counters)
    return AllocationStats(jnp.where(overflow, jnp.iinfo(jnp.int32).max, counters))


def lengths(cache: KVCache) -> Int[Array, " seqs"]:
    """Token slots in use of each sequence, 0 for an empty one.

    Args:
      cache: the cache. It may be donated to a later call while the lengths are still wanted.

    Returns:
      int32 `[max_seqs]`, in tokens. After an eviction this is less than the sequence's position.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2, max_seqs=2)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([1]), jnp.array([3]), total_tokens=3)
      >>> jaxkv.lengths(cache).tolist()
      [0, 3]
    """
    # A copy: what `jit` hands through unchanged is the cache's own array, and goes when that is donated.
    return jnp.copy(cache.table.lengths)


def num_spanned(table: PageTable) -> Int[Array, ""]:
    """Pages from the first of the pool to the highest that is used."""
    number = jnp.arange(1, table.refcounts.shape[0] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(table.refcounts > 0, number, 0))
