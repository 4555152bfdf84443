"""Sharing: a fork names its parent's pages and moves no K or V. `allocate` copies on first write."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

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
from jaxkv.intact import inherit_intact
from jaxkv.operation import REPLICATED, as_given, operation
from jaxkv.ownership import share
from jaxkv.pages import for_each_page
from jaxkv.state import KVCache, PageTable, PolicyState, Status


def fork(
    cache: KVCache, parents: Int[Array, " seqs"], children: Int[Array, " seqs"]
) -> tuple[KVCache, Int[Array, " seqs"]]:
    """Lets each child share all of its parent's pages.

        parent  [a b c d][e f . .]     refcounts 1 1
        child   [a b c d][e f . .]               2 2      the same pages, not copies

    Parents are read as before the call, and one may appear many times. The first writer of the shared
    tail page, parent or child, gets a copy of it from `allocate`. A policy remembers of a child what it does
    of its parent.

    Args:
      cache: the cache.
      parents: slots to share.
      children: empty slots. A negative parent or child makes the entry padding.

    Returns:
      The cache and a `Status` for each entry: OCCUPIED for a child in use, taken by an earlier entry or
      its own parent; INVALID_SEQ for an empty parent or a slot beyond `max_seqs`.

    Raises:
      ValueError: for wrong shapes or dtypes, at trace time.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([1]))
      >>> cache, status = jaxkv.fork(cache, jnp.array([0, 0]), jnp.array([1, 0]))
      >>> [jaxkv.Status(int(s)).name for s in status], int(cache.table.refcounts[0])
      (['OK', 'OCCUPIED'], 2)
    """
    table, policy, status = _fork(cache, *check_call(cache, parents=parents, children=children))
    return replace(cache, table=table, policy=policy), status


@operation(results=lambda cache, *_: (*as_given((cache.table, cache.policy)), REPLICATED))
def _fork(cache: KVCache, parents: Array, children: Array) -> tuple[PageTable, PolicyState | None, Array]:
    config, table = cache.config, cache.table
    max_seqs, num_pages = config.max_seqs, config.num_pages
    parent = clean_slots(parents, max_seqs, once=False)
    positions = rows_of(table.positions, parent)
    status = first_fault(
        ((parents < 0) | (children < 0), Status.PADDING),
        ((parents >= max_seqs) | (children >= max_seqs), Status.INVALID_SEQ),
        (parents == children, Status.OCCUPIED),
        (positions == 0, Status.INVALID_SEQ),
        (rows_of(table.positions, clean_slots(children, max_seqs, once=False)) > 0, Status.OCCUPIED),
    )
    child = clean_slots(children, max_seqs, where=status == Status.OK)
    status = jnp.where((status == Status.OK) & (child == max_seqs), Status.OCCUPIED, status)
    source, row = (table_rows(slot, config).reshape(-1) for slot in (parent, child))
    lengths = rows_of(table.lengths, source)
    size = row_page_sizes(config, parents.shape[0])
    owned = jnp.where(row < config.num_rows, pages_for(lengths, size), 0)

    rows = jnp.stack([source, row], axis=1)

    def share_pages(table: PageTable, entry, place, _) -> PageTable:
        origin, at = rows_of(rows, entry, config.num_rows).T
        page = rows_of(table.pages, (origin, place), num_pages)
        return share(replace(table, pages=table.pages.at[at, place].set(page, **DROP)), page)

    table = for_each_page(share_pages, table, owned)
    table = stamp(table, Operation.FORK, child < max_seqs, parent, child)
    table = replace(
        table,
        lengths=table.lengths.at[row].set(lengths, **DROP),
        positions=table.positions.at[child].set(positions, **DROP),
        prefixes=inherit_intact(table.prefixes, parent, child),
    )
    return table, inherited(cache.policy, parent, child), status


def inherited(
    policy: PolicyState | None, parent: Int[Array, " entries"], child: Int[Array, " entries"]
) -> PolicyState | None:
    """The policy's state where each child's sequence is its parent's, read as before the call.

    Args:
      policy: the state; None stays None.
      parent, child: slots; a child of `max_seqs` for an entry that does nothing.
    """
    return jax.tree.map(lambda x: x.at[child].set(rows_of(x, parent), **DROP), policy)
