"""Plots with matplotlib: the owners of pages, memory over time, waste by page size.

Each function returns a `matplotlib.figure.Figure`; none uses pyplot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxkv.extras import needs_extra
from jaxkv.memory.page_owners import PageMap, page_map
from jaxkv.memory.profile import MemoryProfile, unused_share
from jaxkv.state import KVCache

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for colour-blind readers; further slots repeat it.
OWNERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
FREE, HOLE, RECLAIMABLE, EDGE = "#FFFFFF", "#BBBBBB", "#EFEBDD", "#888888"
PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_CELLS = 2048
_MOST_WRITTEN_IN = 512
_MIB = 2**20


def plot_pages(*caches: KVCache | PageMap, titles: Sequence[str] = ()) -> Figure:
    """The pool as a grid of pages, coloured by owner and filled as far as tokens reach.

    Shared pages are hatched, and pages that only the index of prefixes holds are dotted. A page is labelled
    with its slot, or `×3` if three slots share it. In a large pool a square is several pages.

    Args:
      caches: one or several, drawn side by side.
      titles: one per cache. Default: the number of pages in use.

    Returns:
      The figure.
    """
    if not caches:
        raise ValueError("plot_pages needs a cache")
    maps = [_as_map(cache) for cache in caches]
    figure = _figure(6.5 * len(maps), max(_height(cells) for cells in maps))
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for number, (ax, cells) in enumerate(zip(axes, maps, strict=True)):
        _draw_pages(ax, cells, titles[number] if number < len(titles) else None, _colours(maps))
    _add_legend(figure, maps)
    return figure


def plot_memory(steps: Sequence[int], profiles: Sequence[MemoryProfile]) -> Figure:
    """Memory during a generation: pages in use, the tokens in them, and pages without sharing.

    Args:
      steps: steps of the decode loop, in order.
      profiles: one per step.

    Returns:
      The figure.
    """
    figure = _figure(7.0, 4.2)
    _draw_memory(figure.subplots(), steps, profiles)
    return figure


def plot_waste(lengths: Iterable[int], page_sizes: Sequence[int] = PAGE_SIZES) -> Figure:
    """The unused share of owned pages for sequences of these lengths, by page size.

    Args:
      lengths: tokens of each sequence.
      page_sizes: token slots per page.

    Returns:
      The figure.
    """
    figure = _figure(7.0, 4.2)
    _draw_waste(figure.subplots(), lengths, page_sizes)
    return figure


def plot_generation(
    before: KVCache | PageMap,
    after: KVCache | PageMap,
    steps: Sequence[int],
    profiles: Sequence[MemoryProfile],
    lengths: Iterable[int],
) -> Figure:
    """All plots in one figure: pages before and after compaction, memory over time, waste by page size.

    Args:
      before, after: the cache before and after a `compact`.
      steps, profiles: as for `plot_memory`.
      lengths: as for `plot_waste`.

    Returns:
      The figure.
    """
    maps = _as_map(before), _as_map(after)
    heights = _height(maps[0]), 4.2
    figure = _figure(13.0, sum(heights))
    upper, lower = (figure.add_subfigure(part) for part in figure.add_gridspec(2, 1, height_ratios=heights))
    for ax, cells, title in zip(upper.subplots(1, 2), maps, ("before", "after"), strict=True):
        _draw_pages(ax, cells, f"Pages {title} compaction: {_counts(cells)}", _colours(maps))
    _add_legend(upper, maps)
    left, right = lower.subplots(1, 2)
    _draw_memory(left, steps, profiles)
    _draw_waste(right, lengths, PAGE_SIZES)
    return figure


def _figure(width: float, height: float) -> Figure:
    with needs_extra():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _as_map(cache: KVCache | PageMap) -> PageMap:
    return cache if isinstance(cache, PageMap) else page_map(cache)


def _drawn(pages: PageMap) -> PageMap:
    """The map, with pages grouped if there are too many to draw."""
    return pages.grouped(ceil(pages.num_cells / _MOST_CELLS)) if pages.num_cells > _MOST_CELLS else pages


def _columns(cells: PageMap) -> int:
    """Cells per row: a multiple of 8, for a map about as high as wide."""
    return max(8, ceil(sqrt(cells.num_cells) / 8) * 8)


def _height(pages: PageMap) -> float:
    """Height in inches of a map 6.5 inches wide, with its title and legend."""
    cells = _drawn(pages)
    rows = ceil(cells.num_cells / _columns(cells))
    return 5.8 * rows / _columns(cells) + 1.6


def _counts(pages: PageMap) -> str:
    reclaimable = f"{pages.reclaimable.sum():,} reclaimable, " if pages.reclaimable.any() else ""
    return f"{pages.used.sum():,} in use, {reclaimable}{pages.holes.sum():,} holes"


def _draw_pages(ax: Axes, pages: PageMap, title: str | None, colours: Mapping[int, str]) -> None:
    """Draws a square per cell: framed, filled from below as far as it holds tokens, hatched if shared."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    cells = _drawn(pages)
    columns = _columns(cells)
    number = np.arange(cells.num_cells)
    left, top = number % columns, number // columns
    fill = np.clip(cells.tokens / cells.size, 0, 1)

    def squares(which: np.ndarray, heights: np.ndarray, **style: Any) -> None:
        patches = [
            Rectangle((left[i] + 0.05, top[i] + 0.95 - 0.9 * heights[i]), 0.9, 0.9 * heights[i])
            for i in np.flatnonzero(which)
        ]
        ax.add_collection(PatchCollection(patches, **style))

    whole = np.ones(cells.num_cells)
    free = ~(cells.used | cells.holes | cells.reclaimable)
    squares(free, whole, facecolor=FREE, edgecolor="#DDDDDD", linewidth=0.6)
    squares(cells.holes, whole, facecolor=HOLE, edgecolor=EDGE, linewidth=0.6)
    squares(cells.reclaimable, whole, facecolor=RECLAIMABLE, edgecolor=EDGE, linewidth=0.6, hatch="..")
    squares(cells.used, whole, facecolor=FREE, edgecolor=EDGE, linewidth=0.6)
    for slot in np.unique(cells.owner[cells.used]):
        squares(cells.used & (cells.owner == slot), fill, facecolor=colours[slot], linewidth=0)
    shared = cells.num_owners > 1
    squares(shared, whole, facecolor="none", edgecolor="black", linewidth=0.9, hatch="////")
    if cells.num_cells <= _MOST_WRITTEN_IN:
        _write_owners(ax, cells, left, top)
    rows = int(top[-1]) + 1
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", title=title or f"Pages: {_counts(pages)}")
    across = "page within its row" if cells.pages == 1 else f"cells of {cells.pages} pages"
    ax.set(xlabel=across, ylabel="first page of the row")
    marks = np.arange(0, rows, max(1, ceil(rows / 12)))
    ax.set_yticks(marks + 0.5, [str(mark * columns * cells.pages) for mark in marks])
    marks = np.arange(0, columns, max(1, columns // 8))
    ax.set_xticks(marks + 0.5, [str(mark) for mark in marks])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _colours(maps: Sequence[PageMap]) -> dict[int, str]:
    """A colour for each slot that owns a page."""
    slots = np.unique(np.concatenate([_drawn(pages).owner[_drawn(pages).used] for pages in maps])).tolist()
    return {slot: OWNERS[rank % len(OWNERS)] for rank, slot in enumerate(slots)}


def _write_owners(ax: Axes, cells: PageMap, left: np.ndarray, top: np.ndarray) -> None:
    """Labels each page with its slot, or with the number of its owners."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    size = 8 if cells.num_cells <= 128 else 6 if cells.num_cells <= 256 else 4.5
    for i in np.flatnonzero(cells.used):
        text = str(cells.owner[i]) if cells.num_owners[i] == 1 else f"×{cells.num_owners[i]}"
        centre = left[i] + 0.5, top[i] + 0.5
        ax.text(*centre, text, ha="center", va="center", fontsize=size, path_effects=halo)


def _add_legend(figure: Any, maps: Sequence[PageMap]) -> None:
    from matplotlib.patches import Patch

    colours = _colours(maps)
    patches = [Patch(facecolor=colour, label=f"slot {slot}") for slot, colour in colours.items()]
    if len(colours) > len(OWNERS):
        label = f"a colour per slot, repeated after {len(OWNERS)}"
        patches = [Patch(facecolor=OWNERS[0], edgecolor=OWNERS[1], linewidth=3, label=label)]
    reclaimable = [Patch(facecolor=RECLAIMABLE, edgecolor=EDGE, hatch="..", label="reclaimable")]
    patches += [
        Patch(facecolor=FREE, edgecolor="black", hatch="////", label="shared"),
        *reclaimable * any(pages.reclaimable.any() for pages in maps),
        Patch(facecolor=HOLE, edgecolor=EDGE, label="hole: free, before a used page"),
        Patch(facecolor=FREE, edgecolor="#CCCCCC", label="free"),
    ]
    columns = len(patches) if len(maps) > 1 else 3
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _draw_memory(ax: Axes, steps: Sequence[int], profiles: Sequence[MemoryProfile]) -> None:
    lines = (
        ("pages without sharing", OWNERS[5], "--", [p.used_bytes + p.saved_bytes for p in profiles]),
        ("pages in use", OWNERS[0], "-", [p.used_bytes for p in profiles]),
        ("their tokens", OWNERS[2], ":", [p.stored_tokens * p.bytes_per_token for p in profiles]),
    )
    for label, colour, dashes, sizes in lines:
        mib = [size / _MIB for size in sizes]
        ax.step(steps, mib, where="post", label=label, linewidth=2, color=colour, linestyle=dashes)
    ax.set(title="K and V over the generation", xlabel="decode step", ylabel="MiB", ylim=(0, None))
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)


def _draw_waste(ax: Axes, lengths: Iterable[int], page_sizes: Sequence[int]) -> None:
    lengths = list(lengths)
    waste = [100 * unused_share(lengths, size) for size in page_sizes]
    pages = [sum(-(-length // size) for length in lengths) for size in page_sizes]
    names = [f"{size}\n{count:,}" for size, count in zip(page_sizes, pages, strict=True)]
    ax.bar_label(ax.bar(names, waste, color=OWNERS[0]), [f"{share:.1f}%" for share in waste])
    ax.set(
        title=f"Waste by page size, {len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens",
        xlabel="page size in tokens, and the number of pages below it",
        ylabel="unused share of owned token slots (%)",
        ylim=(0, 1.12 * max(waste) + 1),
    )
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
