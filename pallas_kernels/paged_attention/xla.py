"""`paged_attention` in plain XLA: the specification of the other backends, and the CPU backend.

A loop over tiles of queries, and within it a loop over the tiles of keys that each attends to:

    sequence 0, 1 query at index 5     q tile 0 x key tiles 0
    sequence 1, 1 query at index 300   q tile 1 x key tiles 0 1 2
    sequence 2, empty                  nothing

So the time is proportional to the actual tokens: no padding is computed, and no table is gathered densely.

Joint tiles of adjacent sequences visit shared prefixes first; the tiles of each sequence continue from their
partial results.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import control_flow
from pallas_kernels.checks import Pool, as_layer, is_layer
from pallas_kernels.formats import Format
from pallas_kernels.paged_attention import schedule, softmax
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.masks import sees
from pallas_kernels.ragged import ragged_rows
from pallas_kernels.sizes import next_power_of_two

# Tokens of a key tile, and most tokens of a query tile: a tile of K and V fits a core's cache.
_KEY_TILE = 128
_QUERY_TILE = 64
# Least tokens of a query tile of sequences with several queries, where others have one.
_CHUNK_TILE = 16
# From this many bytes of K in float32 on, XLA splits the copy of a tile over threads.
_SPLIT_BYTES = 512 * 1024
# Up to this many pages of a tile are sliced one by one, which is faster than a gather.
_MAX_SLICES = 16
# Up to this many rows the product of queries and keys transposes the queries, otherwise the keys.
_FEW_ROWS = 4


def lacks(call: Call) -> str | None:
    """None: XLA supports every call."""


def run(call: Call, *, interpret: bool):
    """See `api.paged_attention`. Returns `(out, lse)`, `out` before `Format.outputs`."""
    del interpret
    sequences, scoring, queries = call.sequences, call.scoring, call.queries
    page_table, sinks = sequences.page_table, call.sinks
    hides = {"window": scoring.window, "sink_tokens": scoring.sink_tokens}
    q_dtype = queries[0].dtype
    tokens, q_heads, head_dim = queries[0].shape
    num_layers, _, kv_heads, *_ = call.pool.shape
    exists = is_layer(call.layer, num_layers)
    layer = jnp.clip(as_layer(call.layer), 0, num_layers - 1)
    group = q_heads // kv_heads
    keys, pool = KeyTiles.of_pool(call.pool), call.pool.arrays
    classes = tile_classes(tokens, sequences.count)
    room = min(_QUERY_TILE, tokens) if call.prefixes else max(size for size, _ in classes)
    q = by_head(side_by_side(queries).astype(jnp.float32) * scoring.scale, kv_heads, room)

    def visit_tiles(seen: softmax.Partial, work: Work) -> softmax.Partial:
        """Adds the keys of every tile to the partial results of its rows."""

        def visit_tile(tile, seen):
            page_row, num_keys = page_table[work.table_row[tile]], work.num_keys[tile]
            row_indices, q_tile = jnp.repeat(work.indices(tile), group), work.rows(q, tile)

            def visit(key_tile, own):
                where = keys.locate(page_row, work.stands_for(key_tile, tile), num_keys)
                (k, k_scale), (v, v_scale) = keys.read(pool, layer, where)
                visible = see(row_indices, keys.indices(where), **hides)
                scores = score(q_tile, k, k_scale, visible, softcap=scoring.softcap)
                weigh = _weigh if v_scale is None else lambda p, v: _weigh(p * v_scale.swapaxes(1, 2), v)
                return softmax.extend(own, scores, visible[None], v, product=weigh)

            # Rows past the tile's own attend to nothing here, and stay as they are.
            own = jax.tree.map(lambda whole: work.rows(whole, tile), seen)
            first = work.first_key_tile[tile]
            own = control_flow.fori_loop(first, first + work.num_key_tiles[tile], visit, own)
            return jax.tree.map(lambda whole, part: work.with_rows(whole, part, tile), seen, own)

        return control_flow.fori_loop(0, work.num_tiles, visit_tile, seen)

    nothing_seen = seen = softmax.empty((kv_heads, q.shape[1]), head_dim)
    skipped = None
    if call.prefixes is not None:
        shared = call.prefixes(unit=keys.unit)
        skipped = shared.skipped
        runs = shared.lengths, shared.query_starts, shared.table_rows
        shared_work = plan(tokens, min(_QUERY_TILE, tokens), *runs, keys, group, causal=False)

        def visit_shared():
            seen = visit_tiles(nothing_seen, shared_work)
            # A run may include padding rows, which attend to nothing.
            seq, _ = ragged_rows(sequences.query_starts[1:], q.shape[1] // group)
            has_keys = sequences.kv_lengths.at[seq].get(mode="fill", fill_value=0) > 0
            is_query = jnp.repeat(has_keys, group)[None]
            return jax.tree.map(partial(_where_rows, is_query), seen, nothing_seen)

        seen = control_flow.cond(jnp.any(shared.lengths > 0), visit_shared, lambda: nothing_seen)
    for size, counts in classes:
        work = plan(tokens, size, *sequences.lengths, keys, group, skipped=skipped, counts=counts, **hides)
        seen = visit_tiles(seen, work)
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, group), (1, q.shape[1] // group))
    out, lse = (jnp.where(exists, part, jnp.nan) for part in softmax.finish(seen, sinks))
    return by_token(out, tokens, group).astype(q_dtype), by_token(lse[..., None], tokens, group)[..., 0]


def side_by_side(queries):
    """The queries of a format concatenated to `[tokens, q_heads, widths]`, as the keys of `KeyTiles.read`."""
    q, *more = queries
    return jnp.concatenate([q, *(other.astype(q.dtype) for other in more)], axis=-1) if more else q


def _where_rows(mask, one, other):
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (one.ndim - mask.ndim)), one, other)


def see(row_indices, indices, *, window: int | None, sink_tokens: int):
    """The mask `[rows, size]`. An index of -1 is padding: not attended to, and attends to nothing."""
    return (indices >= 0)[None, :] & sees(
        row_indices[:, None], indices[None, :], window=window, sink_tokens=sink_tokens
    )


def score(q_tile, k, k_scale, visible, *, softcap: float | None):
    """Scores `[kv_heads, rows, size]` of a tile from `KeyTiles.read`; undefined where not visible."""
    scores = _products(q_tile, k, visible)
    if k_scale is not None:
        scores = scores * k_scale.swapaxes(1, 2)
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _products(q_tile, k, visible):
    """`[kv_heads, rows, size]`, zero where a key is not visible."""
    if q_tile.shape[1] > _FEW_ROWS:
        return jnp.where(visible[None], jnp.einsum("hrd,htd->hrt", q_tile, k, precision="highest"), 0.0)
    # Masked before the transpose: XLA would move a bare transpose into the product, and transpose K.
    scores = jnp.einsum("htd,hrd->htr", k, q_tile, precision="highest")
    return jnp.where(visible.T[None], scores, 0.0).swapaxes(1, 2)


_weigh = partial(jnp.einsum, "hrt,htd->hrd", precision="highest")


def _key_tile(width: int, storage: Format) -> int:
    """Tokens of a key tile with `width` elements per token; half as many if that avoids a second thread."""
    halved = storage.halves_tiles and _SPLIT_BYTES <= _KEY_TILE * width * 4 < 2 * _SPLIT_BYTES
    return _KEY_TILE // 2 if halved else _KEY_TILE


def query_tile(tokens: int, num_seqs: int) -> int:
    """Tokens of a query tile, for sequences of about equally many queries."""
    return min(_QUERY_TILE, next_power_of_two(-(-tokens // num_seqs)))


def tile_classes(tokens: int, num_seqs: int) -> list[tuple[int, tuple[int, int]]]:
    """Tokens of a query tile, and the least and most queries of the sequences that are divided into such.

    A step of a server has one query of most sequences, and a chunk of a prompt: tiles of one row for those,
    larger ones for these. Few tokens have one class, as each is a loop to compile.
    """
    size = query_tile(tokens, num_seqs)
    if size == 1 or num_seqs == 1 or tokens <= _QUERY_TILE:
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
    keys: "KeyTiles",
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


@dataclass(frozen=True, slots=True)
class KeyTiles:
    """How a sequence's token slots are divided into tiles: runs of whole pages, or parts of one long page.

    Attributes:
      page_size: token slots per page.
      pages: pages per tile; 1 if a tile is a part.
      parts: tiles per page; 1 if a tile is a run.
      size: token slots per tile.
      storage: format of the pool.
    """

    page_size: int
    pages: int
    parts: int
    size: int
    storage: Format

    @classmethod
    def of(cls, page_size: int, most: int, storage: Format) -> "KeyTiles":
        """The tiling for pages of this size, into tiles of at most `most` token slots, or one page."""
        pages = max(1, most // page_size)
        parts = -(-page_size // most)
        size = pages * page_size if parts == 1 else -(-page_size // parts)
        return cls(page_size, pages, parts, size, storage)

    @classmethod
    def of_pool(cls, pool: Pool) -> "KeyTiles":
        """The tiling for a pool."""
        kv_heads, page_size, _ = pool.shape[2:]
        return cls.of(page_size, _key_tile(kv_heads * pool.head_dim, pool.storage), pool.storage)

    @property
    def unit(self) -> int:
        """Every multiple of this many token slots is the end of a tile."""
        return self.size if self.parts == 1 else self.page_size

    def containing(self, index):
        """The tile that contains a token index."""
        if self.parts == 1:
            return index // self.size
        return index // self.page_size * self.parts + index % self.page_size // self.size

    def locate(self, page_row, tile, num_keys) -> "_Where":
        """The location of a tile. A page past the end of the sequence is replaced by its first page."""
        if self.parts == 1:
            columns = tile * self.pages + jnp.arange(self.pages, dtype=jnp.int32)
            # Entries past the end of the sequence are undefined: read its first page instead.
            columns = jnp.where(columns * self.page_size < num_keys, columns, 0)
            first, start, skip = tile * self.size, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        else:
            columns, part = (tile // self.parts)[None], tile % self.parts
            # The last part would reach past the page, so it starts earlier; the overlap is masked.
            start = jnp.minimum(part * self.size, self.page_size - self.size)
            first, skip = columns[0] * self.page_size + start, part * self.size - start
        return _Where(page_row[columns], start, first, skip, jnp.minimum(num_keys - first, self.size))

    def indices(self, where: "_Where"):
        """The index of each token of a tile; -1 for padding and for tokens of another tile."""
        nth = jnp.arange(self.size, dtype=jnp.int32)
        return jnp.where((nth >= where.skip) & (nth < where.end), where.first + nth, -1)

    def read(self, pool, layer, where: "_Where"):
        """K and V of a tile, `[kv_heads, size, widths]` float32, each with a factor `[.., 1]` or None.

        V and its scales are zero at token slots that are not the tile's own. From a pool of K alone, only K.
        Rows are those of the format's `widened_values`.
        """
        kv_heads = pool[0].shape[2]
        # Elements per token.
        widths = [pages.shape[4] if pages.ndim == 5 else 1 for pages in pool]
        shapes = [(kv_heads, self.pages, self.size // self.pages * width) for width in widths]
        # Reshaped outside the branch: inside it XLA counts the whole pool as read, and splits the copy over
        # threads, which costs more than it saves. An axis of one head is merged too: XLA would choose another
        # layout for it, and copy the whole pool.
        leading = 2 if kv_heads == 1 else 3
        pool = [pages.reshape(*pages.shape[:leading], -1) for pages in pool]
        pools = len(pool) // 2 if self.storage.quantized else len(pool)
        # Scales are not converted.
        kinds = [self.storage.widened_dtype] * pools + [self.storage.scale_dtype] * (len(pool) - pools)
        widen = [self.storage.widen] * pools + [lambda scales: scales] * (len(pool) - pools)

        def copy():
            tile = [
                self._copy(pages, layer, where, shape, convert)
                for pages, shape, convert in zip(pool, shapes, widen, strict=True)
            ]
            for i in range(1, len(tile), 2):
                # Unused token slots may hold NaN, and 0 * NaN is NaN.
                nth = jnp.arange(shapes[i][1] * shapes[i][2], dtype=jnp.int32).reshape(shapes[i][1:])
                own = (nth >= where.skip * widths[i]) & (nth < where.end * widths[i])
                tile[i] = jnp.where(own[None], tile[i], jnp.zeros((), tile[i].dtype))
            return tile

        if self.storage.shares_copies and 4 * math.prod(shapes[0]) >= _SPLIT_BYTES:
            # XLA splits each copy over two threads.
            tile = copy()
        else:
            # The condition is always true. The branch keeps XLA from fusing the reshape into the copy, whose
            # rows would be as short as `head_dim` and copied one element at a time.
            zeros = [jnp.zeros(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
            tile = control_flow.cond(where.end > where.skip, copy, lambda: zeros)
        tile = [part.reshape(kv_heads, self.size, -1) for part in tile]
        scales = tile[pools:] or [None] * pools
        return [self.storage.widened_values(*pair) for pair in zip(tile[:pools], scales, strict=True)]

    def _copy(self, pages, layer, where: "_Where", shape, convert):
        """`[kv_heads, pages, tokens * width]`, converted."""
        kv_heads, _, run = shape
        start = where.start * (run * self.pages // self.size)
        if pages.ndim == 3:
            if self.pages > _MAX_SLICES:
                return convert(pages.at[layer, where.ids].get(mode="promise_in_bounds")[:, :run])[None]
            runs = [
                jax.lax.dynamic_slice(pages, (layer, where.ids[i], start), (1, 1, run))[0]
                for i in range(self.pages)
            ]
            return convert(jnp.stack(runs, axis=1))
        if self.pages > _MAX_SLICES:
            heads = jnp.arange(kv_heads, dtype=jnp.int32)
            tile = pages.at[layer, where.ids[None, :], heads[:, None]].get(mode="promise_in_bounds")
            return convert(tile[..., :run])
        zero = jnp.zeros((), jnp.int32)
        runs = [
            jax.lax.dynamic_slice(pages, (layer, where.ids[i], zero, start), (1, 1, kv_heads, run))[0, 0]
            for i in range(self.pages)
        ]
        return convert(jnp.stack(runs, axis=1))


class _Where(NamedTuple):
    """The location of a tile of keys.

    Attributes:
      ids: its pages.
      start: offset of its first token in the page.
      first: index of that token in the sequence.
      skip, end: range of the tile's own tokens; the others are padding or another tile's.
    """

    ids: Int[Array, " pages"]
    start: Int[Array, ""]
    first: Int[Array, ""]
    skip: Int[Array, ""]
    end: Int[Array, ""]
