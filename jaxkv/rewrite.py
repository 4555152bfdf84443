"""Rewriting tokens that lie in the cache already: pages of the sequence's own, and a walk over its layers.

        before   A [a b c d][e f g h][i j . .]      B shares A's first two pages
        keep     b d g i j
        after    A [b d g i][j . . .]               B [a b c d][e f g h]
                    fresh    A's own third page

What a sibling shares is read and never written. A sequence's own pages are used again, so a rewrite takes
fresh pages only for what it kept in shared ones and does not fit its own.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from jaxkv.config import CacheConfig
from jaxkv.entries import full_rows, pages_for, rows_of
from jaxkv.fingerprint import Operation, stamp
from jaxkv.intact import limit_intact
from jaxkv.ownership import count, forget, num_owners, release, take
from jaxkv.state import KVCache, KVPool, PageTable, Status
from pallas_kernels import control_flow

# Of the tokens that are held beside the pool at a time.
_VISIT_BYTES = 16 * 2**20
_Carry = TypeVar("_Carry")


class Rewrite(NamedTuple):
    """Sequences that are rewritten, in the groups with full attention.

    Attributes:
      slot: of each entry; `max_seqs` for one that is not.
      old, new: its pages before and after, `num_pages` past the last; no new ones where it was refused.
      status: a `Status`: OK where it was granted, OUT_OF_PAGES where it was not.
    """

    slot: Int[Array, " entries"]
    old: Int[Array, "*groups entries pages_per_seq"]
    new: Int[Array, "*groups entries pages_per_seq"]
    status: Int[Array, " entries"]


def own_pages(
    cache: KVCache,
    slot: Int[Array, " entries"],
    first: Int[Array, " entries"],
    lengths: Int[Array, " entries"],
) -> tuple[KVCache, Rewrite]:
    """Gives each sequence pages of its own from a column of its row on, and a new length.

    Args:
      cache: the cache.
      slot: each slot once; `max_seqs` for an entry that does nothing.
      first: column from which on it owns its pages; what lies before stays as it is.
      lengths: token slots in use afterwards, no more than now.

    Returns:
      The cache and the `Rewrite`. Of a sequence that finds too few free pages nothing is changed.
    """
    config = cache.config
    row = full_rows(slot, config)
    columns, new_lengths = (jnp.tile(x, row.shape[0] // slot.shape[0]) for x in (first, lengths))
    wanted = jnp.where(row < config.num_rows, pages_for(new_lengths, config.page_size), 0)
    table, own = _own_rows(cache.table, row, columns[:, None], wanted[:, None], slot.shape[0], config)
    granted = (slot < config.max_seqs) & own.granted
    slot = jnp.where(granted, slot, config.max_seqs)
    row = full_rows(slot, config)
    new = jnp.where((row < config.num_rows)[:, None], own.new, config.num_pages)
    released = own.released & (row < config.num_rows)[:, None]
    table = replace(
        table,
        pages=table.pages.at[row, : new.shape[1]].set(new, mode="drop"),
        lengths=table.lengths.at[row].set(new_lengths, mode="drop"),
    )
    # The end of a chain before its beginning.
    table = release(table, jnp.where(released, own.old, config.num_pages)[:, ::-1].reshape(-1))
    rewritten = own.written & (row < config.num_rows)[:, None]
    table = forget(table, jnp.where(rewritten, own.old, config.num_pages).reshape(-1))
    # Tokens that come in later on a part-full page before that column may be shifted.
    intact = jnp.minimum(first * config.page_size, lengths)
    table = replace(table, prefixes=limit_intact(table.prefixes, slot, intact))
    table = stamp(table, Operation.OWN_PAGES, granted, slot, first, lengths)
    stats = count(cache.stats, cache.table, table, num_taken=own.num_taken)
    status = jnp.where(granted, Status.OK, Status.OUT_OF_PAGES).astype(jnp.int32)
    old, new = (rows.reshape(-1, *slot.shape, rows.shape[1]) for rows in (own.old, new))
    return replace(cache, table=table, stats=stats), Rewrite(slot, old, new, status)


class _OwnRows(NamedTuple):
    """Rows of the page table before and after, if granted; which entries are; what of the old is released.

    `written` are the old pages that are used again.
    """

    old: Int[Array, "rows pages_per_seq"]
    new: Int[Array, "rows pages_per_seq"]
    granted: Bool[Array, " entries"]
    released: Bool[Array, "rows pages_per_seq"]
    written: Bool[Array, "rows pages_per_seq"]
    num_taken: Int[Array, ""]


def _own_rows(
    table: PageTable, row: Array, first: Array, wanted: Array, entries: int, config: CacheConfig
) -> tuple[PageTable, _OwnRows]:
    """Own pages stay in their columns, those beyond the length fill holes, then come fresh ones."""
    num_pages, width = config.num_pages, config.max_pages_per_seq
    column = jnp.arange(width, dtype=jnp.int32)[None, :]
    number = jnp.arange(row.shape[0], dtype=jnp.int32)[:, None]
    old = rows_of(table.pages, row, num_pages)[:, :width]
    changes = (column >= first) & (old < num_pages)
    own = changes & (num_owners(table, old) == 1)
    stays, spare = own & (column < wanted), own & (column >= wanted)
    hole = (column >= first) & (column < wanted) & ~own
    nth_hole = jnp.cumsum(hole, axis=1, dtype=jnp.int32) - 1
    nth_spare = jnp.where(spare, jnp.cumsum(spare, axis=1, dtype=jnp.int32) - 1, width)
    num_holes, num_spare = (jnp.sum(mask, axis=1, dtype=jnp.int32) for mask in (hole, spare))
    need = jnp.maximum(num_holes - num_spare, 0).reshape(-1, entries)
    table, taken = take(table, jnp.sum(need, axis=0, dtype=jnp.int32), old.size)
    start = taken.group_starts(need).reshape(-1, 1)
    nth_fresh = nth_hole - num_spare[:, None]
    fresh_page = rows_of(taken.pages, start + nth_fresh, num_pages)
    spares = jnp.full_like(old, num_pages).at[number, nth_spare].set(old, mode="drop")
    spare_page = rows_of(spares, (number, jnp.where(hole, nth_hole, width)), num_pages)
    new = jnp.where(hole, jnp.where(nth_fresh >= 0, fresh_page, spare_page), num_pages)
    new = jnp.where(stays | ~changes & ~hole, old, new)
    used_again = stays | spare & (nth_spare < num_holes[:, None])
    return table, _OwnRows(old, new, taken.granted, changes & ~used_again, used_again, taken.num_pages)


class Layer(NamedTuple):
    """A layer with full attention.

    Attributes:
      number: among those with full attention.
      group: number of its group.
      nth: among the layers of its group.
    """

    number: Int[Array, ""]
    group: Int[Array, ""]
    nth: Int[Array, ""]

    @classmethod
    def of(cls, number: Int[Array, ""], config: CacheConfig) -> "Layer":
        """The layer of this number."""
        size = config.pool_shape[0]
        return cls(number, number // size, number % size)


def for_each_layer(
    body: Callable[[_Carry, Layer, Rewrite], _Carry], carry: _Carry, rewrite: Rewrite, config: CacheConfig
) -> _Carry:
    """Folds `body(carry, layer, some)` over the layers and the sequences that are rewritten.

    As many sequences at a time as 16 MiB of one layer's tokens hold, one at least; the last visit is padded.
    `some` has the pages of the layer's group alone, `[entries, pages_per_seq]`.
    """
    entries, layers = rewrite.slot.shape[0], len(config.full_layers)
    row_bytes = config.max_pages_per_seq * config.page_bytes // config.pool_shape[0]
    size = max(1, min(entries, _VISIT_BYTES // row_bytes))
    idle = rewrite.slot == config.max_seqs
    order = jnp.argsort(idle, stable=True).astype(jnp.int32)
    visits = (jnp.sum(~idle, dtype=jnp.int32) + size - 1) // size

    def visit(trip: Array, carry: _Carry) -> _Carry:
        layer = Layer.of(trip % layers, config)
        nth = trip // layers * size + jnp.arange(size, dtype=jnp.int32)
        entry = rows_of(order, nth, entries)
        some = Rewrite(
            rows_of(rewrite.slot, entry, config.max_seqs),
            *(rows_of(rows[layer.group], entry, config.num_pages) for rows in (rewrite.old, rewrite.new)),
            status=rows_of(rewrite.status, entry, int(Status.PADDING)),
        )
        return body(carry, layer, some)

    return control_flow.fori_loop(0, visits * layers, visit, carry)


def read_tokens(
    pool: KVPool,
    layer: Int[Array, ""],
    rows: Int[Array, "entries pages_per_seq"],
    places: Int[Array, "entries kv_heads tokens"],
) -> KVPool:
    """What is stored of tokens, `[entries, kv_heads, tokens, ...]`; zeros at indices past a row."""
    at = _locate(pool, layer, rows, places)
    return jax.tree.map(lambda array: array.at[at].get(mode="fill", fill_value=0), pool)


def write_tokens(
    pool: KVPool,
    layer: Int[Array, ""],
    rows: Int[Array, "entries pages_per_seq"],
    places: Int[Array, "entries kv_heads tokens"],
    tokens: KVPool,
) -> KVPool:
    """Stores tokens as they were read; what is meant for an index past a row is dropped."""
    at = _locate(pool, layer, rows, places)
    return jax.tree.map(lambda array, new: array.at[at].set(new, mode="drop"), pool, tokens)


def _locate(pool: KVPool, layer: Array, rows: Array, places: Array) -> tuple[Array, ...]:
    _, num_pages, kv_heads, page_size = pool.k.shape[:4]
    column, offset = places // page_size, places % page_size
    entry = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None, None]
    pages = rows_of(rows, (entry, column), num_pages)
    head = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    return tuple(jnp.broadcast_arrays(layer, pages, head, offset))


def numbers(config: CacheConfig, stored: Any, scale: Shaped[Array, "..."] | None) -> Shaped[Array, "..."]:
    """Stored keys (or values) of tokens, in float32."""
    return config.storage.decode(stored, scale, jnp.float32)


def stored_as(config: CacheConfig, values: Shaped[Array, "..."], *, keys: bool) -> tuple[Any, Any]:
    """Keys or values as the pool stores them, and their scales if it has any."""
    return config.storage.encode(values.astype(config.dtype), keys=keys)
