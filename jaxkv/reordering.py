"""Every slot becomes a fork of another at once, as a step of beam search needs. No K or V moves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.config import CacheConfig
from jaxkv.entries import (
    DROP,
    check_call,
    clean_slots,
    first_fault,
    pages_for,
    row_page_sizes,
    rows_of,
    table_rows,
)
from jaxkv.fingerprint import Operation, stamp
from jaxkv.forking import inherited
from jaxkv.intact import inherit_intact
from jaxkv.operation import REPLICATED, as_given, operation
from jaxkv.ownership import count, release, share
from jaxkv.pages import for_each_column
from jaxkv.state import AllocationStats, KVCache, PageTable, PolicyState, Status
from pallas_kernels.ordering import after


def reorder(
    cache: KVCache, seqs: Int[Array, " seqs"], parents: Int[Array, " seqs"]
) -> tuple[KVCache, Int[Array, " seqs"]]:
    """Lets each slot continue another's sequence: beam search, with one slot a beam.

        before   0 [a b c d][e f . .]    1 [a b c d][g h . .]    2 [i j k .]
        reorder seqs [0, 1, 2], parents [1, 1, 0]
        after    0 [a b c d][g h . .]    1 [a b c d][g h . .]    2 [a b c d][e f . .]

    Parents are read as before the call, so slots may trade sequences. A slot that is its own parent stays as
    it is. No free page is needed: pages are shared, as after `fork`, and those that no slot continues are
    released. The first writer of a shared tail page gets a copy of it from `allocate`, which needs a free
    page. A policy's state follows.

    Args:
      cache: the cache.
      seqs: slots that change, in use or empty.
      parents: the slot whose sequence each of them continues. A negative slot or parent makes the entry
        padding.

    Returns:
      The cache and a `Status` for each entry: INVALID_SEQ for a slot or parent beyond `max_seqs`, for an
      empty parent, and for a slot that an earlier accepted entry names. Such an entry changes nothing.

    Raises:
      ValueError: for wrong shapes or dtypes, at trace time.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0, 1]), jnp.array([1, 1]))
      >>> cache, status = jaxkv.reorder(cache, jnp.array([0, 1]), jnp.array([1, 1]))
      >>> jaxkv.raise_for_status(status)
      >>> cache.table.refcounts.tolist(), int(cache.table.num_free)
      ([0, 2], 1)
    """
    table, stats, policy, status = _reorder(cache, *check_call(cache, seqs=seqs, parents=parents))
    return replace(cache, table=table, stats=stats, policy=policy), status


@operation(results=lambda cache, *_: (*as_given((cache.table, cache.stats, cache.policy)), REPLICATED))
@jax.named_scope("jaxkv.reorder")
def _reorder(
    cache: KVCache, seqs: Array, parents: Array
) -> tuple[PageTable, AllocationStats, PolicyState | None, Array]:
    config, table = cache.config, cache.table
    status = _decide(table, seqs, parents, config.max_seqs)
    changes = (status == Status.OK) & (seqs != parents)
    slot, parent = (clean_slots(x, config.max_seqs, where=changes, once=False) for x in (seqs, parents))
    row, source = (table_rows(x, config).reshape(-1) for x in (slot, parent))
    lengths, positions = rows_of(table.lengths, source), rows_of(table.positions, parent)
    size = row_page_sizes(config, seqs.shape[0])
    new, old = (pages_for(x, size) for x in (lengths, rows_of(table.lengths, row)))
    # A page may stand in another column of its next owner's row, so all are shared before any is released.
    table = for_each_column(_share(source, config), table, jnp.max(new), row.shape[0])
    hand_over = _hand_over(row, source, config)
    table = for_each_column(hand_over, table, jnp.max(jnp.maximum(new, old)), row.shape[0])
    table = stamp(table, Operation.REORDER, changes, slot, parent)
    table = replace(
        table,
        lengths=table.lengths.at[row].set(lengths, **DROP),
        positions=table.positions.at[slot].set(positions, **DROP),
        prefixes=inherit_intact(table.prefixes, parent, slot),
    )
    stats = count(cache.stats, cache.table, table)
    return table, stats, inherited(cache.policy, parent, slot), status


def _decide(table: PageTable, seqs: Array, parents: Array, max_seqs: int) -> Array:
    empty = rows_of(table.positions, clean_slots(parents, max_seqs, once=False)) == 0
    status = first_fault(
        ((seqs < 0) | (parents < 0), Status.PADDING),
        ((seqs >= max_seqs) | (parents >= max_seqs) | empty & (seqs != parents), Status.INVALID_SEQ),
    )
    once = clean_slots(seqs, max_seqs, where=status == Status.OK)
    return jnp.where((status == Status.OK) & (once == max_seqs), Status.INVALID_SEQ, status)


def _share(source: Array, config: CacheConfig):
    def share_pages(table: PageTable, columns: Array) -> PageTable:
        return share(table, rows_of(table.pages, (source[:, None], columns[None, :]), config.num_pages))

    return share_pages


def _hand_over(row: Array, source: Array, config: CacheConfig):
    def hand_over(table: PageTable, columns: Array) -> PageTable:
        old, new = (rows_of(table.pages, (of[:, None], columns), config.num_pages) for of in (row, source))
        at = after(row, old, new)[:, None]
        pages = table.pages.at[at, columns].set(new, **DROP)
        # The end of a chain before its beginning.
        return release(replace(table, pages=pages), old[:, ::-1].reshape(-1))

    return hand_over
