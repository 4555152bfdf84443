"""Who owns which page, on the host: what pictures of a pool are drawn from, and one for a terminal."""

from dataclasses import dataclass

import jax
import numpy as np

from jaxkv.state import KVCache

FREE, SHARED, LEVELS = "·", "▓", "▁▂▃▄▅▆▇█"
# Where a terminal's encoding has no blocks.
ASCII_FREE, ASCII_SHARED, ASCII_LEVELS = ".", "&", "_-=#"


@dataclass(frozen=True, slots=True)
class PageMap:
    """A cell for each page, or for so many pages that stand side by side.

    Attributes:
      owner: the lowest slot that owns the cell, `max_seqs` for a free one.
      num_owners: of the page, the most of any in the cell.
      tokens: token places in use, shared ones once.
      places: token places a cell; of the last one perhaps too many.
      pages: pages a cell.
      max_seqs: slots of the cache.
    """

    owner: np.ndarray
    num_owners: np.ndarray
    tokens: np.ndarray
    places: int
    pages: int
    max_seqs: int

    @property
    def num_cells(self) -> int:
        """Of the map."""
        return len(self.owner)

    @property
    def used(self) -> np.ndarray:
        """Which cells somebody owns."""
        return self.num_owners > 0

    @property
    def holes(self) -> np.ndarray:
        """Free cells below the last that is used."""
        last = np.flatnonzero(self.used).max(initial=-1)
        return ~self.used & (np.arange(self.num_cells) < last)

    def grouped(self, pages: int) -> "PageMap":
        """The same with `pages` of these cells in one."""
        padding = -self.num_cells % pages

        def fold(values: np.ndarray, fill: int) -> np.ndarray:
            return np.pad(values, (0, padding), constant_values=fill).reshape(-1, pages)

        return PageMap(
            owner=fold(self.owner, self.max_seqs).min(1),
            num_owners=fold(self.num_owners, 0).max(1),
            tokens=fold(self.tokens, 0).sum(1),
            places=self.places * pages,
            pages=self.pages * pages,
            max_seqs=self.max_seqs,
        )

    def text(self, width: int = 80, *, rows: int = 16, ascii_only: bool = False) -> str:
        """The map in characters, and what they mean: no line is longer than `width` (20 at least).

        Args:
          width: characters a line.
          rows: lines at most; a large pool has several pages in a character.
          ascii_only: without block characters.
        """
        digits = len(str(self.num_cells * self.pages))
        line = max(8, (max(width, 20) - digits - 1) // 8 * 8)
        if self.num_cells > line * rows:
            return self.grouped(-(-self.num_cells // (line * rows))).text(
                width, rows=rows, ascii_only=ascii_only
            )
        cells = self._characters(ascii_only)
        lines = [
            f"{start * self.pages:>{digits}} {cells[start : start + line]}"
            for start in range(0, self.num_cells, line)
        ]
        return "\n".join([*lines, *self._legend(width, ascii_only)])

    def _characters(self, ascii_only: bool) -> str:
        free, shared, levels = (
            (ASCII_FREE, ASCII_SHARED, ASCII_LEVELS) if ascii_only else (FREE, SHARED, LEVELS)
        )
        heights = np.clip(-(-self.tokens * len(levels) // self.places), 1, len(levels)) - 1
        cells = np.array(list(levels))[heights]
        cells = np.where(self.num_owners > 1, shared, cells)
        return "".join(np.where(self.used, cells, free).tolist())

    def _legend(self, width: int, ascii_only: bool) -> list[str]:
        free, shared, levels = (
            (ASCII_FREE, ASCII_SHARED, ASCII_LEVELS) if ascii_only else (FREE, SHARED, LEVELS)
        )
        one = "a page" if self.pages == 1 else f"{self.pages} pages"
        parts = [f"{free} free", f"{levels[0]} to {levels[-1]} fuller", f"{shared} shared", f"each {one}"]
        lines = [""]
        for part in parts:
            if lines[-1] and len(lines[-1]) + 3 + len(part) > max(width, 20):
                lines.append("")
            lines[-1] += f"{'   ' if lines[-1] else ''}{part}"
        return lines


def page_map(cache: KVCache) -> PageMap:
    """Copies the page table to the host and turns it round: from pages to their owners.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=8, page_size=4)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([9]), total_tokens=9)
      >>> print(page_map(cache).text(width=60))
      0 ██▂·····
      · free   ▁ to █ fuller   ▓ shared   each a page
    """
    config = cache.config
    table = jax.device_get(cache.table)
    owner = np.full(config.num_pages, config.max_seqs)
    tokens = np.zeros(config.num_pages, np.int64)
    sizes = np.repeat([group.page_size for group in config.groups], config.max_seqs)[:, None]
    held = np.clip(table.lengths[:, None] - np.arange(config.num_columns) * sizes, 0, sizes)
    rows, columns = np.nonzero(held)
    pages, largest = table.pages[rows, columns], int(sizes.max())
    np.minimum.at(owner, pages, rows % config.max_seqs)
    # As much of the largest page as this one is full.
    np.maximum.at(tokens, pages, held[rows, columns] * largest // sizes[rows, 0])
    return PageMap(owner, np.asarray(table.refcounts), tokens, largest, 1, config.max_seqs)
