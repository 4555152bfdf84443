"""Who owns which page: how many table entries name it, and a stack of those that none names.

        refcounts    2 0 1 0 1 0          pages 1, 3 and 5 are free
        free_pages   3 5 1 . . .          num_free 3; page 1 is taken next

No other module changes these three. Rows of the page table stay with the operations: whoever enters a page in
a row has taken or shared it here, and whoever removes it from one releases it.

Cost follows the batch and its pages, never the size of the pool: pages come off the stack by rank (a running
sum over the entries), and go back to it the same way. Only `renumber`, `is_live` and `num_spanned` look at
all pages.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.entries import rows_of
from jaxkv.state import AllocationStats, PageTable
from pallas_kernels.control_flow import skip_where_idle
from pallas_kernels.ordering import after

_Amount: TypeAlias = Int[Array, ""] | int


class Taken(NamedTuple):
    """What entries got of the pages that they need."""

    granted: Bool[Array, " entries"]  # whether it got all; True where it needs none
    pages: Int[Array, " most"]  # those taken, entry after entry; `num_pages` past the last
    starts: Int[Array, " entries"]  # where in `pages` an entry's begin
    num_pages: Int[Array, ""]  # how many were taken

    def group_starts(self, need: Int[Array, "groups entries"]) -> Int[Array, "groups entries"]:
        """Where in `pages` each group's begin: of an entry's pages each group has a run, in order."""
        return self.starts[None] + jnp.cumsum(need, axis=0, dtype=jnp.int32) - need


def all_free(num_pages: int) -> dict[str, Array]:
    """The fields of a `PageTable` that say who owns what, where nothing is owned."""
    return dict(
        refcounts=jnp.zeros(num_pages, jnp.int32),
        free_pages=_all_pages(num_pages),
        num_free=jnp.asarray(num_pages, jnp.int32),
    )


def num_available(table: PageTable) -> Int[Array, ""]:
    """Pages that `take` can give."""
    return table.num_free


def num_owners(table: PageTable, pages: Int[Array, "..."]) -> Int[Array, "..."]:
    """Table entries that name each page; 0 for an id of `num_pages`."""
    return rows_of(table.refcounts, pages)


def is_live(table: PageTable) -> Bool[Array, " pages"]:
    """Whether a page is owned, of every page of the pool."""
    return table.refcounts > 0


def num_spanned(table: PageTable) -> Int[Array, ""]:
    """Pages from the first of the pool to the highest that is used."""
    number = jnp.arange(1, table.refcounts.shape[0] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(is_live(table), number, 0))


def take(table: PageTable, need: Int[Array, " entries"], most: int) -> tuple[PageTable, Taken]:
    """Pages for the entries, each with one owner; all that an entry needs, or none.

    First come, first served: from the first entry that does not fit, none that needs a page does.

    Args:
      table: the page table.
      need: pages for each entry.
      most: a static bound of their sum.
    """
    num_pages = table.refcounts.shape[0]
    ends = jnp.cumsum(need, dtype=jnp.int32)
    fits = ends <= num_available(table)
    num_taken = jnp.max(jnp.where(fits, ends, 0))
    # Two at least: XLA makes a slice of one row, and moves it past the writes of `release`.
    rank = jnp.arange(max(2, min(most, num_pages)), dtype=jnp.int32)
    place = jnp.where(rank < num_taken, table.num_free - 1 - rank, num_pages)
    pages = rows_of(table.free_pages, place, num_pages)
    table = replace(
        table,
        refcounts=table.refcounts.at[pages].set(1, mode="drop"),
        # Pages are pushed at this height: after those taken were read, so that the stack need not be copied.
        num_free=after(table.num_free - num_taken, pages),
    )
    return table, Taken(fits | (need == 0), pages, ends - need, num_taken)


def share(table: PageTable, pages: Int[Array, "..."]) -> PageTable:
    """One owner more for each page named; an id of `num_pages` is passed over."""
    return replace(table, refcounts=table.refcounts.at[pages].add(1, mode="drop"))


def release(
    table: PageTable, pages: Int[Array, " entries"], nth: Int[Array, " entries"] | None = None
) -> PageTable:
    """One owner less for each page named; those left without one go to the stack, once.

    Args:
      table: the page table.
      pages: an id of `num_pages` is passed over; a page named twice loses two owners.
      nth: how many entries before one name a page, if that is known: it spares a running sum.
    """
    num_pages = table.refcounts.shape[0]
    owners = num_owners(table, pages)
    refcounts = table.refcounts.at[after(pages, owners)].add(-1, mode="drop")
    # A page of one owner is named once. Of others several entries may be the last to name it.
    sole = owners == 1
    num_sole, num_shared = jnp.sum(jnp.stack([sole, owners > 1]), axis=1, dtype=jnp.int32)
    nth = jnp.cumsum(sole, dtype=jnp.int32) - 1 if nth is None else nth
    counted = refcounts, jnp.where(sole, nth, num_pages), num_sole
    push_once = partial(_push_once, pages)
    refcounts, rank, num_pushed = skip_where_idle(num_shared > 0, push_once, counted)
    place = jnp.where(rank < num_pages, table.num_free + rank, num_pages)
    return replace(
        table,
        refcounts=refcounts,
        free_pages=table.free_pages.at[place].set(pages, mode="drop"),
        num_free=table.num_free + num_pushed,
    )


def _push_once(pages: Array, counted: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Counts, each entry's rank among those that push their page (else `num_pages`), and how many do.

    Entries that name a page without owners write their numbers, below zero, where its count was; the one that
    reads its own back pushes the page.
    """
    refcounts, num_pages = counted[0], counted[0].shape[0]
    dead = rows_of(refcounts, pages, 1) == 0
    mark = -1 - jnp.arange(pages.shape[0], dtype=jnp.int32)
    refcounts = refcounts.at[jnp.where(dead, pages, num_pages)].min(mark, mode="drop")
    pushes = dead & (rows_of(refcounts, pages) == mark)
    rank = jnp.cumsum(pushes, dtype=jnp.int32)
    refcounts = refcounts.at[jnp.where(pushes, pages, num_pages)].set(0, mode="drop")
    return refcounts, jnp.where(pushes, rank - 1, num_pages), rank[-1]


def renumber(table: PageTable, target: Int[Array, " pages"]) -> PageTable:
    """Each live page gets its `target` for an id, lower than any free one's; `num_pages` for a free page."""
    refcounts = jnp.zeros_like(table.refcounts).at[target].set(table.refcounts, mode="drop")
    return replace(table, refcounts=refcounts, free_pages=_all_pages(target.shape[0]))


def count(
    stats: AllocationStats,
    old: PageTable | None = None,
    new: PageTable | None = None,
    *,
    num_taken: _Amount = 0,
    **others: _Amount,
) -> AllocationStats:
    """Adds to the counters what a call changed.

    Args:
      stats: the counters.
      old, new: the page table before and after, if the call took or released pages.
      num_taken: pages taken; the others by which the stack differs were released, after that.
      **others: more of any other counter.
    """
    change = 0 if old is None or new is None else new.num_free - old.num_free
    increments = others | dict(
        total_allocations=num_taken,
        total_deallocations=num_taken + change,
        current_pages=-change,
        peak_pages=jnp.maximum(stats.current_pages + num_taken - stats.peak_pages, 0),
    )
    amounts = jnp.stack([jnp.asarray(increments.get(name, 0), jnp.int32) for name in stats.names()])
    counters = stats.counters + amounts
    # A counter that has grown past the largest int32 stays there instead of turning negative.
    overflow = (amounts > 0) & (counters < stats.counters)
    return AllocationStats(jnp.where(overflow, jnp.iinfo(jnp.int32).max, counters))


def _all_pages(num_pages: int) -> Int[Array, " pages"]:
    """A stack of all pages, the lowest on top."""
    return jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32)
