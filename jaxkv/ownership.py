"""Who owns which page: how many table entries name it, and a stack of those that none names.

        refcounts    2 0 1 0 1 0          pages 1, 3 and 5 are free
        free_pages   3 5 1 . . .          num_free 3; page 1 is taken next

With `prefix_cache` the index of prefixes is one more owner of the pages that it holds. Those that it alone
holds are reclaimable: they can be found again, and are taken once the stack does not suffice.

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

from jaxkv import prefix_index, reclaimable
from jaxkv.entries import DROP, rows_of
from jaxkv.prefix_index import is_recorded
from jaxkv.state import AllocationStats, PageTable, PrefixIndex
from pallas_kernels import control_flow
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
    """Pages that `take` can give: those on the stack and those that can be reclaimed."""
    if table.prefixes is None:
        return table.num_free
    return table.num_free + table.prefixes.num_reclaimable


def num_owners(table: PageTable, pages: Int[Array, "..."]) -> Int[Array, "..."]:
    """Table entries that name each page; 0 for an id of `num_pages`."""
    owners = rows_of(table.refcounts, pages)
    if table.prefixes is None:
        return owners
    return owners - is_recorded(table.prefixes, pages).astype(jnp.int32)


def is_live(table: PageTable) -> Bool[Array, " pages"]:
    """Whether a page is owned, of every page of the pool."""
    return table.refcounts > 0


def num_users(table: PageTable) -> Int[Array, " pages"]:
    """Table entries that name a page, of every page of the pool."""
    return num_owners(table, jnp.arange(table.refcounts.shape[0], dtype=jnp.int32))


def num_spanned(table: PageTable) -> Int[Array, ""]:
    """Pages from the first of the pool to the highest that is used."""
    number = jnp.arange(1, table.refcounts.shape[0] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(is_live(table), number, 0))


def take(table: PageTable, need: Int[Array, " entries"], most: int) -> tuple[PageTable, Taken]:
    """Pages for the entries, each with one owner; all that an entry needs, or none.

    First come, first served: from the first entry that does not fit, none that needs a page does. What the
    stack lacks is reclaimed.

    Args:
      table: the page table.
      need: pages for each entry.
      most: a static bound of their sum.
    """
    num_pages = table.refcounts.shape[0]
    ends = jnp.cumsum(need, dtype=jnp.int32)
    fits = ends <= num_available(table)
    num_taken = jnp.max(jnp.where(fits, ends, 0))
    if table.prefixes is not None:
        table = _reclaim(table, num_taken - table.num_free)
    # Two at least: XLA makes a slice of one row, and moves it past the writes of `release`.
    rank = jnp.arange(max(2, min(most, num_pages)), dtype=jnp.int32)
    place = jnp.where(rank < num_taken, table.num_free - 1 - rank, num_pages)
    pages = rows_of(table.free_pages, place, num_pages)
    table = replace(
        table,
        refcounts=table.refcounts.at[pages].set(1, **DROP),
        # Pages are pushed at this height: after those taken were read, so that the stack need not be copied.
        num_free=after(table.num_free - num_taken, pages),
    )
    return table, Taken(fits | (need == 0), pages, ends - need, num_taken)


def share(table: PageTable, pages: Int[Array, "..."]) -> PageTable:
    """One owner more for each page named; an id of `num_pages` is passed over."""
    return replace(table, refcounts=table.refcounts.at[pages].add(1, **DROP))


def release(
    table: PageTable, pages: Int[Array, " entries"], nth: Int[Array, " entries"] | None = None
) -> PageTable:
    """One owner less for each page named; those left without one go to the stack, once.

    Args:
      table: the page table.
      pages: an id of `num_pages` is passed over; a page named twice loses two owners. Of recorded pages that
        become reclaimable the first is reclaimed first.
      nth: how many entries before one name a page, if that is known: it spares a running sum.
    """
    num_pages = table.refcounts.shape[0]
    owners = rows_of(table.refcounts, pages)
    refcounts = table.refcounts.at[after(pages, owners)].add(-1, **DROP)
    # A page of one owner is named once. Of others several entries may be the last to name it.
    sole = owners == 1
    num_sole, num_shared = jnp.sum(jnp.stack([sole, owners > 1]), axis=1, dtype=jnp.int32)
    nth = jnp.cumsum(sole, dtype=jnp.int32) - 1 if nth is None else nth
    counted = refcounts, jnp.where(sole, nth, num_pages), num_sole
    push_once = partial(_push_once, pages)
    refcounts, rank, num_pushed = skip_where_idle(num_shared > 0, push_once, counted)
    place = jnp.where(rank < num_pages, table.num_free + rank, num_pages)
    table = replace(
        table,
        refcounts=refcounts,
        free_pages=table.free_pages.at[place].set(pages, **DROP),
        num_free=table.num_free + num_pushed,
    )
    if table.prefixes is None:
        return table
    left = is_recorded(table.prefixes, pages) & (rows_of(refcounts, pages) == 1)
    left = jnp.where(left, pages, num_pages)
    index = skip_where_idle(
        jnp.any(left < num_pages), lambda index: reclaimable.enqueue(index, left), table.prefixes
    )
    return replace(table, prefixes=index)


def share_found(table: PageTable, pages: Int[Array, " entries"]) -> tuple[PageTable, Int[Array, ""]]:
    """As `share`, for pages found in the index; also returns how many had no sequence before."""
    assert table.prefixes is not None
    index, num_taken = reclaimable.dequeue(table.prefixes, pages)
    return replace(share(table, pages), prefixes=index), num_taken


def hold(table: PageTable, pages: Int[Array, " entries"]) -> PageTable:
    """The index of prefixes, which has entered these pages, is one owner more of each."""
    return share(table, pages)


def clear_index(table: PageTable, empty: PrefixIndex) -> PageTable:
    """The index holds nothing any more; looks at all pages."""
    index = table.prefixes
    assert index is not None
    num_pages = table.refcounts.shape[0]
    number = jnp.arange(num_pages, dtype=jnp.int32)
    recorded, alone = is_recorded(index, number), index.queued_at >= 0
    rank = jnp.cumsum(alone, dtype=jnp.int32)
    place = jnp.where(alone, table.num_free + rank - 1, num_pages)
    return replace(
        table,
        refcounts=table.refcounts - recorded.astype(jnp.int32),
        free_pages=table.free_pages.at[place].set(number, **DROP),
        num_free=table.num_free + rank[-1],
        prefixes=replace(empty, intact=index.intact, num_reclaimed=index.num_reclaimed),
    )


def forget(table: PageTable, pages: Int[Array, " entries"]) -> PageTable:
    """The index no longer holds these pages, those of them that it did: they will be written to.

    Args:
      table: the page table.
      pages: each once, all in use by a sequence; `num_pages` for none.
    """
    if table.prefixes is None:
        return table
    num_pages, size = table.refcounts.shape[0], prefix_index.CHUNK
    recorded = is_recorded(table.prefixes, pages)
    rank = jnp.cumsum(recorded, dtype=jnp.int32)
    trips = (rank[-1] + size - 1) // size
    most = -(-pages.shape[0] // size) * size
    to = jnp.where(recorded, rank - 1, most)
    together = jnp.full(most, num_pages, jnp.int32).at[to].set(pages, **DROP)

    def let_go(trip: Array, table: PageTable) -> PageTable:
        some = rows_of(together, trip * size + jnp.arange(size, dtype=jnp.int32), num_pages)
        assert table.prefixes is not None
        return replace(
            table,
            prefixes=prefix_index.let_go(table.prefixes, some),
            refcounts=table.refcounts.at[some].add(-1, **DROP),
        )

    return control_flow.fori_loop(0, trips, let_go, table)


def reclaim_nodes(table: PageTable, num_nodes: Int[Array, ""]) -> PageTable:
    """Reclaims pages until the index has so many nodes to spare, or nothing is reclaimable."""

    def is_short(table: PageTable) -> Bool[Array, ""]:
        index = table.prefixes
        assert index is not None
        return (index.num_free_nodes < num_nodes) & (index.num_reclaimable > 0)

    def reclaim(table: PageTable) -> PageTable:
        assert table.prefixes is not None
        return _reclaim_some(table, num_nodes - table.prefixes.num_free_nodes)

    return control_flow.while_loop(is_short, reclaim, table)


def _reclaim(table: PageTable, short: Int[Array, ""]) -> PageTable:
    """Reclaims so many pages, which must be there, in the order in which their last sequences left them."""
    height = table.num_free + jnp.maximum(short, 0)
    return control_flow.while_loop(
        lambda table: table.num_free < height,
        lambda table: _reclaim_some(table, height - table.num_free),
        table,
    )


def _reclaim_some(table: PageTable, most: Int[Array, ""]) -> PageTable:
    """Reclaims up to so many, from a part of the queue."""
    assert table.prefixes is not None
    num_pages = table.refcounts.shape[0]
    index, pages = reclaimable.next_reclaimed(table.prefixes, most)
    goes = pages < num_pages
    rank = jnp.cumsum(goes, dtype=jnp.int32)
    place = jnp.where(goes, table.num_free + rank - 1, num_pages)
    return replace(
        table,
        refcounts=table.refcounts.at[pages].add(-1, **DROP),
        free_pages=table.free_pages.at[place].set(pages, **DROP),
        num_free=table.num_free + rank[-1],
        prefixes=prefix_index.let_go(index, pages),
    )


def _push_once(pages: Array, counted: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Counts, each entry's rank among those that push their page (else `num_pages`), and how many do.

    Entries that name a page without owners write their numbers where its count was; the one that reads its
    own back pushes the page.
    """
    refcounts, num_pages = counted[0], counted[0].shape[0]
    dead = rows_of(refcounts, pages, 1) == 0
    number = jnp.arange(pages.shape[0], dtype=jnp.int32)
    refcounts = refcounts.at[jnp.where(dead, pages, num_pages)].max(number, **DROP)
    pushes = dead & (rows_of(refcounts, pages) == number)
    rank = jnp.cumsum(pushes, dtype=jnp.int32)
    refcounts = refcounts.at[jnp.where(pushes, pages, num_pages)].set(0, **DROP)
    return refcounts, jnp.where(pushes, rank - 1, num_pages), rank[-1]


def renumber(table: PageTable, target: Int[Array, " pages"]) -> PageTable:
    """Each live page gets its `target` for an id, lower than any free one's; `num_pages` for a free page."""
    refcounts = jnp.zeros_like(table.refcounts).at[target].set(table.refcounts, **DROP)
    index = table.prefixes
    if index is not None:
        index = prefix_index.renumber_pages(index, target)
    return replace(table, refcounts=refcounts, free_pages=_all_pages(target.shape[0]), prefixes=index)


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
      num_taken: pages taken into use; the others by which those available differ were released, after that.
      **others: more of any other counter.
    """
    change: _Amount = 0
    if old is not None and new is not None:
        change = num_available(new) - num_available(old)
        if old.prefixes is not None and new.prefixes is not None:
            others["prefix_pages_reclaimed"] = new.prefixes.num_reclaimed - old.prefixes.num_reclaimed
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
