"""Tiles of K and V: how a sequence's pages are divided into them, and how one is read from the pool."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import control_flow
from pallas_kernels.checks import Pool
from pallas_kernels.formats import Format

# Tokens of a key tile: a tile of K and V fits a core's cache.
_KEY_TILE = 128
# From this many bytes of K in float32 on, XLA splits the copy of a tile over threads.
_SPLIT_BYTES = 512 * 1024
# Up to this many pages of a tile are sliced one by one, which is faster than a gather.
_MAX_SLICES = 16


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


def _key_tile(width: int, storage: Format) -> int:
    """Tokens of a key tile with `width` elements per token; half as many if that avoids a second thread."""
    halved = storage.halves_tiles and _SPLIT_BYTES <= _KEY_TILE * width * 4 < 2 * _SPLIT_BYTES
    return _KEY_TILE // 2 if halved else _KEY_TILE
