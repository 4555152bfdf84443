"""Divides the work into query tiles, and their key tiles into items of equal size.

The schedule is computed on the device from the lengths, so one compiled program works for every batch of a
shape:

    sequence 0, 1 query at index 5      query tile 0     item 0: key tile  0
    sequence 1, 1 query at index 300    query tile 1     item 1: key tiles 0 1
                                                         item 2: key tiles 2
    sequence 2, empty                   query tile 2     no keys, no item

With a window and sink tokens, the key tiles with sink tokens are visited under the numbers of as many tiles
before the window. Here 3 and 4 stand for the key tiles 0 and 1:

    key tiles        0 1 2 3 4 5 6 7      sink tokens in 0 1, the window in 5 6 7
    visited                3 4 5 6 7

If adjacent sequences begin with the same pages (see `prefixes`), joint tiles of their queries visit the
shared tokens, and the tiles of each sequence begin after them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.ragged import ragged_rows


class QueryTiles(NamedTuple):
    """Runs of adjacent rows of `q` of one sequence, or of padding.

    Attributes:
      table_row: row of the page table.
      first_row, num_rows: its rows of `q`.
      first_index: index of its first row in the sequence; row `n` attends to keys up to `first_index + n`.
      first_key: index of the first key that it visits.
      num_keys: end of the keys that its last row attends to; 0 for padding and for empty sequences.
    """

    table_row: Int[Array, " tiles"]
    first_row: Int[Array, " tiles"]
    num_rows: Int[Array, " tiles"]
    first_index: Int[Array, " tiles"]
    first_key: Int[Array, " tiles"]
    num_keys: Int[Array, " tiles"]


class Items(NamedTuple):
    """Items of the work. An item past the last has `tile` 0 and no key tiles.

    Attributes:
      tile: the query tile.
      begin, end: its key tiles.
      starts: first item of each query tile, and the end of the last, if items are in the order of tiles.
    """

    tile: Int[Array, " items"]
    begin: Int[Array, " items"]
    end: Int[Array, " items"]
    starts: Int[Array, " tiles+1"]


def num_query_tiles(tokens: int, num_seqs: int, size: int, least: int = 1) -> int:
    """Most tiles: one per sequence of `least` rows and for the padding, and one per further `size` rows."""
    runs = min(tokens // least, num_seqs + 1)
    return runs + (tokens - runs) // size


def query_tiles(
    tokens: int,
    size: int,
    kv_lengths: Int[Array, " seqs"],
    query_starts: Int[Array, " seqs+1"],
    table_rows: Int[Array, " seqs"],
    *,
    window: int | None = None,
    skipped: Int[Array, " seqs"] | None = None,
    causal: bool = True,
    counts: tuple[int, int] | None = None,
) -> QueryTiles:
    """Divides the rows of `q` into tiles of at most `size`; every row is in one.

    Args:
      tokens: rows of `q`, static.
      size: static.
      kv_lengths, query_starts, table_rows, window: as in `paged_attention`.
      skipped: first tokens of each sequence that are not visited.
      causal: whether the queries are the last tokens of their sequence. Else they come after it, and attend
        to all of it.
      counts: least and most rows of a sequence, static: only sequences with so many have tiles, and padding
        has some or none. Default: all.
    """
    num_seqs = kv_lengths.shape[0]
    # Rows past the last sequence form one more sequence, which is empty. `ends` excludes it: on a mesh XLA's
    # partitioner would pad a vector longer than a sharded one, and count the padding.
    starts = jnp.concatenate([query_starts, jnp.full(1, tokens, query_starts.dtype)]).astype(jnp.int32)
    num_queries = starts[1:] - starts[:-1]
    lengths = jnp.concatenate([kv_lengths.astype(jnp.int32), jnp.zeros(1, jnp.int32)])
    num_tiles, least = (num_queries[:num_seqs] + size - 1) // size, 1
    if counts is not None:
        least, most = counts
        own = (least <= num_queries[:num_seqs]) & (num_queries[:num_seqs] <= most)
        num_tiles = jnp.where(own, num_tiles, 0)
    ends = jnp.cumsum(num_tiles, dtype=jnp.int32)
    seq, nth = ragged_rows(ends, num_query_tiles(tokens, num_seqs, size, least))
    offset = nth * size
    num_rows = jnp.clip(num_queries[seq] - offset, 0, size)
    first_index = lengths[seq] - num_queries[seq] + offset if causal else lengths[seq]
    key_end = first_index + num_rows if causal else first_index
    first_key = jnp.zeros_like(first_index)
    if window is not None:
        first_key = jnp.maximum(first_index - window + 1, 0)
    own_seq = jnp.minimum(seq, num_seqs - 1)
    if skipped is not None:
        first_key = jnp.maximum(first_key, skipped[own_seq])
    return QueryTiles(
        table_row=table_rows[own_seq].astype(jnp.int32),
        first_row=starts[seq] + offset,
        num_rows=num_rows,
        first_index=first_index,
        first_key=first_key,
        num_keys=jnp.where((lengths[seq] > 0) & (num_rows > 0), key_end, 0),
    )


def share(
    tiles: QueryTiles, num_items: int, key_tile: int, *, busy: int | None = None, sink_tokens: int = 0
) -> Items:
    """Divides each query tile's key tiles into items of about equal size.

    The size is the least for which `num_items` suffice, so that a long sequence among short ones is divided
    among many programs. The items of a query tile are of equal size: with a small last one the others would
    be larger.

    Args:
      tiles: the query tiles.
      num_items: static, more than `busy`.
      key_tile: tokens per key tile.
      busy: most tiles that have keys; static. Default: all.
      sink_tokens: as in `paged_attention`.
    """
    num_tiles = tiles.num_keys.shape[0]
    first, last = _key_tiles(tiles, key_tile, sink_tokens)
    count = jnp.maximum(last - first, 0)
    # sum(ceil(count / size)) <= busy + sum(count) / size <= num_items
    spare = num_items - (num_tiles if busy is None else busy)
    size = jnp.maximum((jnp.sum(count, dtype=jnp.int32) + spare - 1) // spare, 1)
    pieces = (count + size - 1) // size
    ends = jnp.cumsum(pieces, dtype=jnp.int32)
    # Equal pieces; no larger ones, and no more of them.
    size = (count + pieces - 1) // jnp.maximum(pieces, 1)
    entry, nth = ragged_rows(ends, num_items)
    tile = jnp.minimum(entry, num_tiles - 1)
    begin = jnp.where(entry < num_tiles, first[tile] + nth * size[tile], 0)
    return Items(
        tile=jnp.where(entry < num_tiles, tile, 0),
        begin=begin,
        end=jnp.where(entry < num_tiles, jnp.minimum(begin + size[tile], last[tile]), 0),
        starts=jnp.concatenate([jnp.zeros(1, jnp.int32), ends]),
    )


def whole(tiles: QueryTiles, key_tile: int, *, heaviest_first: bool = False, sink_tokens: int = 0) -> Items:
    """One item per query tile, in order, or largest first, so that the last to start is short."""
    tile = jnp.arange(tiles.num_keys.shape[0], dtype=jnp.int32)
    begin, end = _key_tiles(tiles, key_tile, sink_tokens)
    starts = jnp.arange(tiles.num_keys.shape[0] + 1, dtype=jnp.int32)
    if heaviest_first:
        _, tile, begin, end = lax.sort((begin - end, tile, begin, end), num_keys=1)
    return Items(tile, begin, end, starts)


def _key_tiles(tiles: QueryTiles, key_tile: int, sink_tokens: int) -> tuple[Array, Array]:
    """The first key tile that a query tile visits, and the end of the last."""
    first = first_visited(tiles.first_key // key_tile, -(-sink_tokens // key_tile))
    return first, (tiles.num_keys + key_tile - 1) // key_tile


def first_visited(first: Int[Array, "..."], num_sinks: int) -> Int[Array, "..."]:
    """The first visited key tile, from the window's first and the number of tiles with sink tokens."""
    return jnp.maximum(first - num_sinks, 0)


def stands_for(visited: Int[Array, ""], first: Int[Array, ""], begin: Int[Array, ""]) -> Int[Array, ""]:
    """The key tile that a visited number stands for.

    Args:
      visited: the number.
      first: the window's first key tile.
      begin: the first visited number.
    """
    return jnp.where(visited < first, visited - begin, visited)
