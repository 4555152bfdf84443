"""Which slot owns each page, on the host: the data for plots of a pool, and a map in text."""

from dataclasses import dataclass

import jax
import numpy as np

from jaxkv.state import KVCache

FREE, SHARED, RECLAIMABLE, LEVELS = "·", "▓", "░", "▁▂▃▄▅▆▇█"
# For terminals whose encoding lacks block characters.
ASCII_FREE, ASCII_SHARED, ASCII_RECLAIMABLE, ASCII_LEVELS = ".", "&", "~", "_-=#"


@dataclass(frozen=True, slots=True)
class PageMap:
    """A cell for each page, or for each group of adjacent pages.

    Attributes:
      owner: the lowest slot that owns a page of the cell, `max_seqs` for a free cell.
      num_owners: the most owners of a page of the cell.
      reclaimable: whether only the index of prefixes holds a page of the cell, and no slot owns one.
      tokens: token slots in use; shared ones count once.
      size: token slots per cell; the last cell may have fewer.
      pages: pages per cell.
      max_seqs: slots of the cache.
    """

    owner: np.ndarray
    num_owners: np.ndarray
    reclaimable: np.ndarray
    tokens: np.ndarray
    size: int
    pages: int
    max_seqs: int

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return len(self.owner)

    @property
    def used(self) -> np.ndarray:
        """Which cells are owned."""
        return self.num_owners > 0

    @property
    def holes(self) -> np.ndarray:
        """Free cells before the last one that is not free."""
        live = self.used | self.reclaimable
        last = np.flatnonzero(live).max(initial=-1)
        return ~live & (np.arange(self.num_cells) < last)

    def grouped(self, pages: int) -> "PageMap":
        """The map with groups of `pages` cells merged into one."""
        padding = -self.num_cells % pages

        def fold(values: np.ndarray, fill: int) -> np.ndarray:
            return np.pad(values, (0, padding), constant_values=fill).reshape(-1, pages)

        num_owners = fold(self.num_owners, 0).max(1)
        return PageMap(
            owner=fold(self.owner, self.max_seqs).min(1),
            num_owners=num_owners,
            reclaimable=fold(self.reclaimable, False).any(1) & (num_owners == 0),
            tokens=fold(self.tokens, 0).sum(1),
            size=self.size * pages,
            pages=self.pages * pages,
            max_seqs=self.max_seqs,
        )

    def text(self, width: int = 80, *, rows: int = 16, ascii_only: bool = False) -> str:
        """The map in characters, with a legend.

        Args:
          width: most characters per line, at least 20.
          rows: most lines of the map; in a large pool a character is several pages.
          ascii_only: use no block characters.
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
        free, shared, reclaimable, levels = _signs(ascii_only)
        heights = np.clip(-(-self.tokens * len(levels) // self.size), 1, len(levels)) - 1
        cells = np.array(list(levels))[heights]
        cells = np.where(self.num_owners > 1, shared, cells)
        others = np.where(self.reclaimable, reclaimable, free)
        return "".join(np.where(self.used, cells, others).tolist())

    def _legend(self, width: int, ascii_only: bool) -> list[str]:
        free, shared, reclaimable, levels = _signs(ascii_only)
        one = "a page" if self.pages == 1 else f"{self.pages} pages"
        parts = [f"{free} free", f"{levels[0]} to {levels[-1]} fuller", f"{shared} shared"]
        parts += [f"{reclaimable} reclaimable"] * bool(self.reclaimable.any())
        parts += [f"each {one}"]
        lines = [""]
        for part in parts:
            if lines[-1] and len(lines[-1]) + 3 + len(part) > max(width, 20):
                lines.append("")
            lines[-1] += f"{'   ' if lines[-1] else ''}{part}"
        return lines


def _signs(ascii_only: bool) -> tuple[str, str, str, str]:
    if ascii_only:
        return ASCII_FREE, ASCII_SHARED, ASCII_RECLAIMABLE, ASCII_LEVELS
    return FREE, SHARED, RECLAIMABLE, LEVELS


def page_map(cache: KVCache) -> PageMap:
    """Copies the page table to the host and finds the owners of each page.

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
    owners = np.bincount(pages, minlength=config.num_pages)
    reclaimable = (owners == 0) & (table.refcounts > 0)
    return PageMap(owner, owners, reclaimable, tokens, largest, 1, config.max_seqs)
