"""The queue of reclaimable pages: those that no sequence uses, and the index of prefixes still holds.

The page that lost its last sequence first is reclaimed first. An entry of the queue counts while `queued_at`
of its page names its place: a page that is used again leaves its entry behind.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.entries import rows_of
from jaxkv.prefix_index import CHUNK
from jaxkv.state import PrefixIndex
from pallas_kernels import control_flow
from pallas_kernels.ordering import after


def enqueue(index: PrefixIndex, pages: Int[Array, " entries"]) -> PrefixIndex:
    """Makes pages reclaimable, the first of them before the others; of a page named twice the last counts.

    Args:
      index: the index.
      pages: pages that have lost their last sequence; `num_pages` for none.
    """
    num_pages, size = index.holders.shape[0], index.queue.shape[0]
    queued_at, is_last = _mark_once(index.queued_at, pages)
    rank = jnp.cumsum(is_last, dtype=jnp.int32)
    index = replace(index, queued_at=queued_at)
    index = control_flow.only_if(index.queue_ends[1] + rank[-1] > size, _tidy_queue, index)
    at = jnp.where(is_last, index.queue_ends[1] + rank - 1, size)
    return replace(
        index,
        queue=index.queue.at[at].set(pages, mode="drop"),
        queued_at=index.queued_at.at[jnp.where(is_last, pages, num_pages)].set(at, mode="drop"),
        queue_ends=index.queue_ends.at[1].add(rank[-1]),
        num_reclaimable=index.num_reclaimable + rank[-1],
    )


def dequeue(index: PrefixIndex, pages: Int[Array, " entries"]) -> tuple[PrefixIndex, Int[Array, ""]]:
    """Makes pages no longer reclaimable, those that were.

    Returns:
      The index, and how many were; a page named twice counts once.
    """
    num_pages = index.holders.shape[0]
    waits = rows_of(index.queued_at, pages, -1) >= 0
    pages = jnp.where(waits, pages, num_pages)
    queued_at, is_last = _mark_once(index.queued_at, pages)
    count = jnp.sum(is_last, dtype=jnp.int32)
    queued_at = queued_at.at[jnp.where(is_last, pages, num_pages)].set(-1, mode="drop")
    return replace(index, queued_at=queued_at, num_reclaimable=index.num_reclaimable - count), count


def next_reclaimed(index: PrefixIndex, most: Int[Array, ""]) -> tuple[PrefixIndex, Int[Array, " chunk"]]:
    """Takes up to `most` pages off the queue, from the next `CHUNK` of its entries; `num_pages` for none."""
    num_pages = index.holders.shape[0]
    at = index.queue_ends[0] + jnp.arange(CHUNK, dtype=jnp.int32)
    page = rows_of(index.queue, jnp.where(at < index.queue_ends[1], at, index.queue.shape[0]), num_pages)
    waits = rows_of(index.queued_at, page, -1) == at
    rank = jnp.cumsum(waits, dtype=jnp.int32)
    passed = jnp.sum(rank - waits.astype(jnp.int32) < most, dtype=jnp.int32)
    pages = jnp.where(waits & (rank <= most), page, num_pages)
    count = jnp.minimum(rank[-1], most)
    start = jnp.minimum(index.queue_ends[0] + passed, index.queue_ends[1])
    index = replace(
        index,
        queued_at=index.queued_at.at[after(pages, waits.astype(jnp.int32))].set(-1, mode="drop"),
        queue_ends=index.queue_ends.at[0].set(start),
        num_reclaimable=index.num_reclaimable - count,
        num_reclaimed=index.num_reclaimed + count,
    )
    return index, pages


def _mark_once(queued_at: Array, pages: Int[Array, " entries"]) -> tuple[Array, Bool[Array, " entries"]]:
    """Marks pages in the queue's places, below -1; says which entry names its page last."""
    mark = -2 - jnp.arange(pages.shape[0], dtype=jnp.int32)
    queued_at = queued_at.at[pages].min(mark, mode="drop")
    return queued_at, rows_of(queued_at, pages, -1) == mark


def _tidy_queue(index: PrefixIndex) -> PrefixIndex:
    """Moves the entries that count to the start. There is room for twice the pages: once in many calls."""
    at = jnp.arange(index.queue.shape[0], dtype=jnp.int32)
    counts = (at >= index.queue_ends[0]) & (at < index.queue_ends[1])
    counts &= rows_of(index.queued_at, index.queue, -1) == at
    rank = jnp.cumsum(counts, dtype=jnp.int32)
    to = jnp.where(counts, rank - 1, at.shape[0])
    pages = jnp.where(counts, index.queue, index.holders.shape[0])
    return replace(
        index,
        queue=index.queue.at[to].set(index.queue, mode="drop"),
        queued_at=index.queued_at.at[pages].set(to, mode="drop"),
        queue_ends=jnp.stack([jnp.zeros_like(rank[-1]), rank[-1]]),
    )
