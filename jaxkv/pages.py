"""Rows of the page table: free, truncate, and walks over the pages of many rows. No K or V in sight."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.config import CacheConfig
from jaxkv.entries import check_vectors, clean_slots, pages_for, rows_of
from jaxkv.fingerprint import Operation, stamp
from jaxkv.operation import as_given, operation
from jaxkv.ownership import count, release
from jaxkv.state import AllocationStats, KVCache, PageTable, PolicyState
from pallas_kernels import control_flow
from pallas_kernels.ordering import after
from pallas_kernels.ragged import ragged_rows

# Table entries visited at a time by operations on whole rows. Short rows need one visit and no loop.
_CHUNK = 1024


def free(cache: KVCache, seqs: Int[Array, " seqs"]) -> KVCache:
    """Releases the pages of `seqs`; a page is free again when its last owner releases it.

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
    """Shortens sequences, as after rejected speculative tokens; pages left empty are released.

    A longer length than now and a negative one do nothing, nor do padding, empty slots and slots
    beyond `max_seqs`. Of several lengths for one slot the smallest holds.

    Args:
      cache: the cache.
      seqs: slots.
      lengths: token slots to keep, one element an entry.

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
    asked = clean_slots(seqs, config.max_seqs, where=lengths >= 0, once=False)
    slot = clean_slots(asked, config.max_seqs)
    new_lengths = table.lengths.at[asked].min(lengths, mode="drop")
    old, new = rows_of(table.lengths, slot), rows_of(new_lengths, slot)
    kept = pages_for(new, config.page_size)
    num_cut = pages_for(old, config.page_size) - kept

    def give_back(table: PageTable, entry, place, nth):
        row, column = rows_of(slot, entry, config.max_seqs), rows_of(kept, entry) + place
        page = rows_of(table.pages, (row, column), config.num_pages)
        pages = table.pages.at[after(row, page), column].set(config.num_pages, mode="drop")
        return release(replace(table, pages=pages), page, nth)

    table = for_each_page(give_back, table, num_cut)
    positions = jnp.where(new == 0, 0, rows_of(table.positions, slot) - (old - new))
    positions = table.positions.at[slot].set(positions, mode="drop")
    table = replace(table, lengths=new_lengths, positions=positions)
    table = stamp(table, Operation.TRUNCATE, new < old, slot, new)
    policy = cache.policy
    if policy is not None:
        shortened = jnp.where(new < old, slot, config.max_seqs)
        policy = replace(policy, values=policy.rule.forget(policy.values, shortened))
    return table, count(cache.stats, cache.table, table), policy


def drop_pages(
    table: PageTable,
    slot: Int[Array, " entries"],
    first: Int[Array, " entries"],
    dropped: Int[Array, " entries"],
    config: CacheConfig,
) -> PageTable:
    """Takes whole pages out of rows; what stands behind them moves up. Lengths follow, positions stay.

        drop 2 from column 1     [s s s s][a b c d][e f g h][i j . .]   ->   [s s s s][i j . .]

    Args:
      table: the page table.
      slot: each slot once; one beyond the table for an entry that does nothing.
      first: column of the first page that goes.
      dropped: how many go, full ones.
      config: of the cache.
    """
    num_pages, max_seqs = config.num_pages, config.max_seqs
    dropped = jnp.where(slot < max_seqs, dropped, 0)

    def give_back(table: PageTable, entry, place, nth):
        at = rows_of(slot, entry, max_seqs), rows_of(first, entry) + place
        return release(table, rows_of(table.pages, at, num_pages), nth)

    def move_up(table: PageTable, entry, place, _):
        row, column = rows_of(slot, entry, max_seqs), rows_of(first, entry) + place
        # Past the end of a row stands `num_pages`, which moves up too.
        behind = rows_of(table.pages, (row, column + rows_of(dropped, entry)), num_pages)
        return replace(table, pages=table.pages.at[row, column].set(behind, mode="drop"))

    moved = jnp.where(dropped > 0, pages_for(rows_of(table.lengths, slot), config.page_size) - first, 0)
    table = for_each_page(give_back, table, dropped)
    table = for_each_page(move_up, table, moved)
    table = stamp(table, Operation.DROP_PAGES, dropped > 0, slot, first, dropped)
    return replace(table, lengths=table.lengths.at[slot].add(-dropped * config.page_size, mode="drop"))


def for_each_page(body, table: PageTable, counts: Int[Array, " entries"]) -> PageTable:
    """Folds `body(table, entry, place, nth)` over some pages of each entry's row, a chunk of them at a time.

    Args:
      body: takes the table and three int32 vectors: of each page its entry, `len(counts)` for padding; its
        place among those of the entry; and how many of the chunk come before it.
      table: the page table.
      counts: pages of each entry, no more than a row has. Where all rows fit one chunk no loop is compiled.
    """
    entries, width = counts.shape[0], table.pages.shape[1]
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    if entries * width <= _CHUNK:
        entry, place = jnp.divmod(jnp.arange(entries * width, dtype=jnp.int32), width)
        nth = (ends - counts)[entry] + place
        return body(table, jnp.where(place < counts[entry], entry, entries), place, nth)
    nth = jnp.arange(_CHUNK, dtype=jnp.int32)

    def visit(chunk: Array, table: PageTable) -> PageTable:
        return body(table, *ragged_rows(ends, _CHUNK, chunk * _CHUNK), nth)

    return control_flow.fori_loop(0, (ends[-1] + _CHUNK - 1) // _CHUNK, visit, table)


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
