"""The rows of queries, and their tiles: runs of adjacent tokens of one sequence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.paged_attention import schedule
from pallas_kernels.paged_attention.xla.key_tiles import KeyTiles
from pallas_kernels.sizes import next_power_of_two

# Most tokens of a query tile.
QUERY_TILE = 64
# Least tokens of a query tile of sequences with several queries, where others have one.
_CHUNK_TILE = 16


def query_tile(tokens: int, num_seqs: int) -> int:
    """Tokens of a query tile, for sequences of about equally many queries."""
    return min(QUERY_TILE, next_power_of_two(-(-tokens // num_seqs)))


def tile_classes(tokens: int, num_seqs: int) -> list[tuple[int, tuple[int, int]]]:
    """Tokens of a query tile, and the least and most queries of the sequences that are divided into such.

    A step of a server has one query of most sequences, and a chunk of a prompt: tiles of one row for those,
    larger ones for these. Few tokens have one class, as each is a loop to compile.
    """
    size = query_tile(tokens, num_seqs)
    if size == 1 or num_seqs == 1 or tokens <= QUERY_TILE:
        return [(size, (1, tokens))]
    return [(1, (1, 1)), (max(size, _CHUNK_TILE), (2, tokens))]


class Work(NamedTuple):
    """Query tiles, each of up to `size` adjacent tokens of one sequence.

    A token of `group` query heads to a KV head is as many adjacent rows; see `by_head`.

    Attributes:
      size, group: static.
      first_token, num_tokens: of each tile.
      first_index: index of its first token in the sequence.
      table_row, num_keys: row of the page table, and end of the keys that the tile's last row attends to.
      first_key_tile, num_key_tiles: the key tiles to visit.
      window_key_tile: with sink tokens, the first that stands for itself; see `schedule`.
      num_tiles: those up to the last with keys.
    """

    size: int
    group: int
    first_token: Int[Array, " tiles"]
    num_tokens: Int[Array, " tiles"]
    first_index: Int[Array, " tiles"]
    table_row: Int[Array, " tiles"]
    num_keys: Int[Array, " tiles"]
    first_key_tile: Int[Array, " tiles"]
    num_key_tiles: Int[Array, " tiles"]
    window_key_tile: Int[Array, " tiles"] | None
    num_tiles: Int[Array, ""]

    def stands_for(self, key_tile, tile):
        """The key tile that a visited number stands for."""
        if self.window_key_tile is None:
            return key_tile
        return schedule.stands_for(key_tile, self.window_key_tile[tile], self.first_key_tile[tile])

    def indices(self, tile):
        """The index of each token of a tile in its sequence, -1 for those past its end."""
        nth = jnp.arange(self.size, dtype=jnp.int32)
        return jnp.where(nth < self.num_tokens[tile], self.first_index[tile] + nth, -1)

    def rows(self, whole, tile):
        """`[kv_heads, size * group, ...]` of an array from `by_head`: the tile's rows and some after them."""
        return jax.lax.dynamic_slice_in_dim(
            whole, self.first_token[tile] * self.group, self.size * self.group, axis=1
        )

    def with_rows(self, whole, rows, tile):
        """The array with these rows at the tile."""
        return jax.lax.dynamic_update_slice_in_dim(whole, rows, self.first_token[tile] * self.group, axis=1)


def plan(
    tokens: int,
    size: int,
    kv_lengths,
    query_starts,
    table_rows,
    keys: KeyTiles,
    group: int,
    *,
    sink_tokens: int = 0,
    **options,
) -> Work:
    """The query tiles of `size` tokens; `options` are those of `schedule.query_tiles`."""
    tiles = schedule.query_tiles(tokens, size, kv_lengths, query_starts, table_rows, **options)
    has_keys = tiles.num_keys > 0
    window_key_tile = keys.containing(tiles.first_key)
    num_sinks = keys.containing(sink_tokens - 1) + 1 if sink_tokens else 0
    first_key_tile = schedule.first_visited(window_key_tile, num_sinks)
    last_key_tile = keys.containing(jnp.maximum(tiles.num_keys - 1, 0))
    nth = jnp.arange(has_keys.shape[0], dtype=jnp.int32)
    return Work(
        size=size,
        group=group,
        first_token=tiles.first_row,
        num_tokens=tiles.num_rows,
        first_index=tiles.first_index,
        table_row=tiles.table_row,
        num_keys=tiles.num_keys,
        first_key_tile=first_key_tile,
        num_key_tiles=jnp.where(has_keys, last_key_tile - first_key_tile + 1, 0),
        window_key_tile=window_key_tile if sink_tokens else None,
        num_tiles=jnp.max(jnp.where(has_keys, nth + 1, 0)),
    )


def by_head(q, kv_heads: int, room: int):
    """`[kv_heads, (tokens + room) * group, width]` of `[tokens, q_heads, width]`; the last rows are zero.

    So the queries of adjacent tokens that read the same KV head are adjacent rows, and a slice of `room`
    tokens may begin at any of them.
    """
    tokens, q_heads, width = q.shape
    q = jnp.pad(q, ((0, room), (0, 0), (0, 0)))
    q = q.reshape(tokens + room, kv_heads, q_heads // kv_heads, width)
    return q.transpose(1, 0, 2, 3).reshape(kv_heads, -1, width)


def by_token(rows, tokens: int, group: int):
    """From `by_head`'s layout back to `[tokens, q_heads, width]`."""
    kv_heads, _, width = rows.shape
    rows = rows[:, : tokens * group].reshape(kv_heads, tokens, group, width)
    return rows.transpose(1, 0, 2, 3).reshape(tokens, kv_heads * group, width)
