"""Whole pages that no token to come can see, taken out of rows: by a window or by `SlidingWindow`."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.config import CacheConfig
from jaxkv.entries import DROP, page_sizes, pages_for, rows_of, table_rows
from jaxkv.fingerprint import Operation, stamp
from jaxkv.ownership import count, release
from jaxkv.pages import for_each_page
from jaxkv.state import AllocationStats, KVCache, PageTable
from pallas_kernels.control_flow import skip_where_idle
from pallas_kernels.ordering import after


def release_windows(cache: KVCache, slot: Int[Array, " entries"]) -> KVCache:
    """Releases the pages that no token to come can see, in groups with a window.

    By the sequence's position, and so that `rollback` tokens can be taken back.

    Args:
      cache: the cache.
      slot: each slot once; `max_seqs` for an entry that does nothing.
    """
    config = cache.config
    windows = [group.window for group in config.groups if group.window is not None]
    if not windows:
        return cache
    # Groups with a window come last.
    row, size = (of[-len(windows) :] for of in (table_rows(slot, config), page_sizes(config)))
    behind = jnp.asarray([[window - 1 + config.rollback] for window in windows], jnp.int32)
    position = rows_of(cache.table.positions, slot)[None]
    start = position - rows_of(cache.table.lengths, row)
    dropped = jnp.maximum(position - behind - start, 0) // size
    size = jnp.broadcast_to(size, row.shape).reshape(-1)
    row, dropped = row.reshape(-1), dropped.reshape(-1)

    def release_pages(carry: tuple[PageTable, AllocationStats]) -> tuple[PageTable, AllocationStats]:
        table, stats = carry
        released = drop_pages(table, row, jnp.zeros_like(row), dropped, size, config)
        return released, count(stats, table, released)

    carry = skip_where_idle(jnp.any(dropped > 0), release_pages, (cache.table, cache.stats))
    return replace(cache, table=carry[0], stats=carry[1])


def drop_pages(
    table: PageTable,
    row: Int[Array, " rows"],
    first: Int[Array, " rows"],
    dropped: Int[Array, " rows"],
    size: Int[Array, " rows"],
    config: CacheConfig,
) -> PageTable:
    """Takes whole pages out of rows; what stands behind them moves up. Lengths follow, positions stay.

        drop 2 from column 1     [s s s s][a b c d][e f g h][i j . .]   ->   [s s s s][i j . .]

    Args:
      table: the page table.
      row: each row once; `num_rows` for an entry that does nothing.
      first: column of the first page that goes.
      dropped: how many go, full ones.
      size: token slots a page.
      config: of the cache.
    """
    num_pages, num_rows = config.num_pages, config.num_rows
    dropped = jnp.where(row < num_rows, dropped, 0)

    def give_back(table: PageTable, entry, place, nth):
        at = rows_of(row, entry, num_rows), rows_of(first, entry) + place
        return release(table, rows_of(table.pages, at, num_pages), nth)

    def move_up(table: PageTable, entry, place, _):
        at, column = rows_of(row, entry, num_rows), rows_of(first, entry) + place
        # Past the end of a row stands `num_pages`, which moves up too.
        behind = rows_of(table.pages, (at, column + rows_of(dropped, entry)), num_pages)
        return replace(table, pages=table.pages.at[at, column].set(behind, **DROP))

    moved = jnp.where(dropped > 0, pages_for(rows_of(table.lengths, row), size) - first, 0)
    table = for_each_page(give_back, table, dropped, backwards=table.prefixes is not None)
    # Rows change after all pages were read, or the table would be copied.
    table = for_each_page(move_up, table, after(moved, table.num_free))
    table = stamp(table, Operation.DROP_PAGES, dropped > 0, row, first, dropped)
    return replace(table, lengths=table.lengths.at[row].add(-dropped * size, **DROP))
