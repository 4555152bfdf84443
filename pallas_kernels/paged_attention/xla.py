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
    q = side_by_side(queries).astype(jnp.float32) * scoring.scale

    def visit_tiles(work: Work, seen: softmax.Partial) -> softmax.Partial:
        """Adds the keys of every tile to the partial results of its rows."""
        queries = pack(q, work, kv_heads)

        def visit_tile(tile, done):
            page_row, num_keys = page_table[work.table_row[tile]], work.num_keys[tile]
            row_indices, q_tile = jnp.repeat(work.indices[tile], group), at(queries, tile)

            def visit(key_tile, seen):
                where = keys.locate(page_row, work.stands_for(key_tile, tile), num_keys)
                (k, k_scale), (v, v_scale) = keys.read(pool, layer, where)
                visible = see(row_indices, keys.indices(where), **hides)
                scores = score(q_tile, k, k_scale, visible, softcap=scoring.softcap)
                weigh = _weigh if v_scale is None else lambda p, v: _weigh(p * v_scale.swapaxes(1, 2), v)
                return softmax.extend(seen, scores, visible[None], v, product=weigh)

            first, own = work.first_key_tile[tile], jax.tree.map(lambda part: at(part, tile), seen)
            own = control_flow.fori_loop(first, first + work.num_key_tiles[tile], visit, own)
            return jax.tree.map(lambda whole, part: whole.at[tile].set(part), done, own)

        return control_flow.fori_loop(0, work.num_keys.shape[0], visit_tile, seen)

    def nothing_seen(work: Work) -> softmax.Partial:
        num_tiles, size = work.indices.shape
        return softmax.empty((num_tiles, kv_heads, size * group), head_dim)

    size = query_tile(tokens, sequences.count)
    if call.prefixes is None:
        work = plan(tokens, size, *sequences.lengths, keys, **hides)
        seen = nothing_seen(work)
    else:
        shared = call.prefixes(unit=keys.unit)
        work = plan(tokens, size, *sequences.lengths, keys, skipped=shared.skipped)
        runs = shared.lengths, shared.query_starts, shared.table_rows
        shared_work = plan(tokens, min(_QUERY_TILE, tokens), *runs, keys, causal=False)

        def visit_shared():
            seen = visit_tiles(shared_work, nothing_seen(shared_work))
            by_token = (
                _unpack(part, shared_work.rows, group)
                for part in (seen.m[..., None], seen.l[..., None], seen.o)
            )
            m, l, o = (pack(part, work, kv_heads) for part in by_token)  # noqa: E741
            # A run may include padding rows, which attend to nothing.
            is_query = jnp.repeat(work.indices >= 0, group, axis=1)[:, None]
            seen = softmax.Partial(m[..., 0], l[..., 0], o)
            return jax.tree.map(partial(_where_rows, is_query), seen, nothing_seen(work))

        seen = control_flow.cond(jnp.any(shared.lengths > 0), visit_shared, lambda: nothing_seen(work))
    seen = visit_tiles(work, seen)
    rows = work.rows
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, group), (1, work.indices.shape[1]))[None]
    out, lse = (jnp.where(exists, part, jnp.nan) for part in softmax.finish(seen, sinks))
    return _unpack(out, rows, group).astype(q_dtype), _unpack(lse[..., None], rows, group)[..., 0]


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
    """Tokens of a query tile."""
    return min(_QUERY_TILE, next_power_of_two(-(-tokens // num_seqs)))


def at(array, index):
    """The array at one index of its first axis."""
    return jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


class Work(NamedTuple):
    """The query tiles, each of up to `query_tile` adjacent tokens of one sequence.

    Attributes:
      tokens: row of `q` of each tile's rows, `tokens` for padding.
      indices: index of each row in its sequence, -1 for padding.
      rows: `(tile, row)` of each token of `q`; every token is in a tile.
      table_row, num_keys: row of the page table, and end of the keys that the tile's last row attends to.
      first_key_tile, num_key_tiles: the key tiles to visit.
      window_key_tile: with sink tokens, the first that stands for itself; see `schedule`.
    """

    tokens: Int[Array, "tiles query_tile"]
    indices: Int[Array, "tiles query_tile"]
    rows: tuple[Int[Array, " tokens"], Int[Array, " tokens"]]
    table_row: Int[Array, " tiles"]
    num_keys: Int[Array, " tiles"]
    first_key_tile: Int[Array, " tiles"]
    num_key_tiles: Int[Array, " tiles"]
    window_key_tile: Int[Array, " tiles"] | None

    def stands_for(self, key_tile, tile):
        """The key tile that a visited number stands for."""
        if self.window_key_tile is None:
            return key_tile
        return schedule.stands_for(key_tile, self.window_key_tile[tile], self.first_key_tile[tile])


def plan(
    tokens: int,
    size: int,
    kv_lengths,
    query_starts,
    table_rows,
    keys: "KeyTiles",
    *,
    sink_tokens: int = 0,
    **options,
) -> Work:
    """The query tiles of `size` tokens; `options` are those of `schedule.query_tiles`."""
    tiles = schedule.query_tiles(tokens, size, kv_lengths, query_starts, table_rows, **options)
    offset = jnp.arange(size, dtype=jnp.int32)
    exists = offset[None, :] < tiles.num_rows[:, None]
    has_keys = tiles.num_keys > 0
    window_key_tile = keys.containing(tiles.first_key)
    num_sinks = keys.containing(sink_tokens - 1) + 1 if sink_tokens else 0
    first_key_tile = schedule.first_visited(window_key_tile, num_sinks)
    last_key_tile = keys.containing(jnp.maximum(tiles.num_keys - 1, 0))
    return Work(
        tokens=jnp.where(exists, tiles.first_row[:, None] + offset[None, :], tokens),
        indices=jnp.where(exists & has_keys[:, None], tiles.first_index[:, None] + offset[None, :], -1),
        rows=ragged_rows(jnp.cumsum(tiles.num_rows, dtype=jnp.int32), tokens),
        table_row=tiles.table_row,
        num_keys=tiles.num_keys,
        first_key_tile=first_key_tile,
        num_key_tiles=jnp.where(has_keys, last_key_tile - first_key_tile + 1, 0),
        window_key_tile=window_key_tile if sink_tokens else None,
    )


def pack(q, work: Work, kv_heads: int):
    """Query tiles `[tiles, kv_heads, query_tile * group, head_dim]`, grouped by KV head."""
    head_dim = q.shape[-1]
    tiles = q.at[work.tokens].get(mode="fill", fill_value=0)
    tiles = tiles.reshape(*tiles.shape[:2], kv_heads, -1, head_dim)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(tiles.shape[0], kv_heads, -1, head_dim)


def _unpack(tiles, rows, group: int):
    """From `pack`'s layout back to `[tokens, q_heads, ...]`."""
    num_tiles, kv_heads, _, width = tiles.shape
    tiles = tiles.reshape(num_tiles, kv_heads, -1, group, width).transpose(0, 2, 1, 3, 4)
    return tiles.at[rows].get(mode="promise_in_bounds").reshape(rows[0].shape[0], -1, width)


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
