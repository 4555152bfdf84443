"""Host-side checks of the index of prefixes."""

from typing import Any

import numpy as np

from jaxkv.config import CacheConfig
from jaxkv.errors import CacheCorruptedError
from jaxkv.prefix_sizes import WAYS


def recorded_pages(index: Any) -> np.ndarray:
    """Which pages the index holds, bool `[pages]`."""
    return np.asarray(index.holders) < index.pages.size


def check_index(config: CacheConfig, table: Any, owned: np.ndarray) -> None:
    """Checks that the index of prefixes agrees with itself and with the page table.

    Args:
      config: of the cache.
      table: the page table, as NumPy arrays.
      owned: which elements of its rows name a page.

    Raises:
      CacheCorruptedError: naming the node or page, and why.
    """
    index = table.prefixes
    _check_ids(config, index)
    live = _live_nodes(index)
    _check_holders(config, index)
    _check_nodes(index, live)
    _check_chains(index, live)
    _check_queue(config, table, owned)


def _check_ids(config: CacheConfig, index: Any) -> None:
    """Ids that other checks go by; one past the last stands for none."""
    for name, most in (
        ("parents", len(index.parents)),
        ("buckets", len(index.parents)),
        ("pages", config.num_pages),
    ):
        ids = getattr(index, name).reshape(-1)
        for at in np.flatnonzero((ids < 0) | (ids > most))[:1]:
            raise CacheCorruptedError(f"prefixes.{name}, entry {at}: {ids[at]} is not in 0..{most}")


def _live_nodes(index: Any) -> np.ndarray:
    nodes, num_free = len(index.parents), int(index.num_free_nodes)
    if not 0 <= num_free <= nodes:
        raise CacheCorruptedError(f"num_free_nodes {num_free} is not in 0..{nodes}")
    free = index.free_nodes[:num_free]
    if len(np.unique(free)) < num_free or (num_free and not 0 <= free.min() <= free.max() < nodes):
        raise CacheCorruptedError("the stack of free nodes has a node twice, or one out of range")
    live = np.ones(nodes, bool)
    live[free] = False
    return live


def _check_holders(config: CacheConfig, index: Any) -> None:
    recorded = recorded_pages(index)
    named = index.pages.reshape(-1)
    back = np.full(config.num_pages, index.pages.size)
    held = np.flatnonzero(named < config.num_pages)
    back[named[held]] = held
    for page in np.flatnonzero(np.where(recorded, back != index.holders, back < index.pages.size))[:1]:
        raise CacheCorruptedError(
            f"page {page}: recorded at {index.holders[page]}, but the nodes have it at {back[page]}"
        )
    if len(held) != recorded.sum():
        raise CacheCorruptedError(f"{len(held)} pages stand in nodes, but {recorded.sum()} are recorded")


def _check_nodes(index: Any, live: np.ndarray) -> None:
    nodes, num_pages = len(live), len(index.holders)
    has_page = np.any(index.pages < num_pages, axis=1)
    below = np.bincount(index.parents[live], minlength=nodes + 1)[:nodes]
    for node in np.flatnonzero(np.where(live, below != index.children, has_page | (below > 0)))[:1]:
        raise CacheCorruptedError(
            f"node {node}: {index.children[node]} children, but {below[node]} nodes name it their parent"
            if live[node]
            else f"node {node} is free, but has a page or a child"
        )
    for node in np.flatnonzero(live & ~has_page & (below == 0))[:1]:
        raise CacheCorruptedError(f"node {node} has neither a page nor a child")
    entered = np.full(nodes, -1)
    places = np.flatnonzero(index.buckets < nodes)
    entered[index.buckets[places]] = places
    wrong = np.where(live, entered != index.places, entered >= 0)
    for node in np.flatnonzero(wrong)[:1]:
        raise CacheCorruptedError(f"node {node} stands at {entered[node]} of the buckets, not at its place")
    if len(places) != live.sum() or len(index.buckets) % WAYS:
        raise CacheCorruptedError(f"{len(places)} places of buckets are taken, by {live.sum()} nodes")


def _check_chains(index: Any, live: np.ndarray) -> None:
    """Every chain has a first node, and one salt."""
    nodes = len(live)
    up = np.append(np.where(live, index.parents, nodes), nodes)
    salts = np.append(index.salts, 0)
    for node in np.flatnonzero((up[:-1] < nodes) & (salts[up[:-1]] != index.salts))[:1]:
        raise CacheCorruptedError(
            f"node {node}: its salt is {index.salts[node]}, that of its parent {salts[up[node]]}"
        )
    # Twice as far up in each round.
    for _ in range(nodes.bit_length()):
        up = up[up]
    for node in np.flatnonzero(up < nodes)[:1]:
        raise CacheCorruptedError(f"node {node}: its chain has no first node")


def _check_queue(config: CacheConfig, table: Any, owned: np.ndarray) -> None:
    index = table.prefixes
    users = np.bincount(table.pages[owned], minlength=config.num_pages)
    alone = recorded_pages(index) & (users == 0)
    for page in np.flatnonzero(alone != (index.queued_at >= 0))[:1]:
        raise CacheCorruptedError(
            f"page {page}: {users[page]} rows name it, but its place in the queue is {index.queued_at[page]}"
        )
    begin, end = index.queue_ends.tolist()
    if not 0 <= begin <= end <= len(index.queue):
        raise CacheCorruptedError(f"the queue goes from {begin} to {end}, of {len(index.queue)} places")
    pages = np.flatnonzero(alone)
    at = index.queued_at[pages]
    good = (at >= begin) & (at < end) & (index.queue[np.minimum(at, len(index.queue) - 1)] == pages)
    for page in pages[~good][:1]:
        raise CacheCorruptedError(f"page {page} does not stand at its place in the queue")
    if int(index.num_reclaimable) != alone.sum():
        raise CacheCorruptedError(
            f"num_reclaimable is {int(index.num_reclaimable)}, but the index alone holds {alone.sum()} pages"
        )
    for slot in np.flatnonzero(index.intact < 0)[:1]:
        raise CacheCorruptedError(f"slot {slot}: {index.intact[slot]} intact tokens, fewer than none")
