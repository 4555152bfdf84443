"""The index of recorded prefixes: look-up, insertion, and what becomes of nodes that lose their pages.

        tokens   [a b c d][e f g h][i j . .]        [a b c d][x y z w]
        nodes    0        1                                  2             0 is the parent of 1 and of 2
        pages    7        3                                  9

A hash of all tokens so far picks a bucket of eight nodes. One of them is right if its tokens are those of the
block and its parent is the node found for the block before: by induction all that precedes is equal too, so
the hash decides nothing but speed. All blocks of all prompts are looked up at once.

This module knows nodes; `reclaimable` is the queue of pages that none but the index owns, and which pages are
free is the business of `ownership`.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from jaxkv.config import CacheConfig
from jaxkv.entries import rows_of
from jaxkv.intact import NEVER_TOUCHED
from jaxkv.prefix_sizes import WAYS, index_shapes
from jaxkv.state import PrefixIndex
from pallas_kernels import control_flow
from pallas_kernels.ordering import after

# Pages that are taken from their nodes at a time.
CHUNK = 128

_SEEDS = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35)


class Chain(NamedTuple):
    """Nodes found for the blocks of some prompts.

    Attributes:
      nodes: node of each block; `num_nodes` from the first that is not found on.
      num_found: blocks found.
      buckets: where in `PrefixIndex.buckets` each block's bucket begins.
      tags: of each block.
    """

    nodes: Int[Array, "entries blocks"]
    num_found: Int[Array, " entries"]
    buckets: Int[Array, "entries blocks"]
    tags: UInt32[Array, "entries blocks"]


def empty_index(config: CacheConfig) -> PrefixIndex:
    """An index that holds nothing."""
    arrays = {name: jnp.zeros(*of) for name, of in index_shapes(config).items()}
    nodes, held = arrays["pages"].shape
    full = {
        "parents": nodes,
        "pages": config.num_pages,
        "buckets": nodes,
        "num_free_nodes": nodes,
        "holders": nodes * held,
        "queued_at": -1,
        "intact": NEVER_TOUCHED,
    }
    arrays |= {name: jnp.full_like(arrays[name], value) for name, value in full.items()}
    arrays["free_nodes"] = jnp.arange(nodes - 1, -1, -1, dtype=jnp.int32)
    return PrefixIndex(**arrays)


def is_recorded(index: PrefixIndex, pages: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Whether the index holds each page; False for an id of `num_pages`."""
    return rows_of(index.holders, pages, index.pages.size) < index.pages.size


# Looking up -------------------------------------------------------------------------------


def look_up(
    index: PrefixIndex,
    tokens: Int[Array, "entries blocks block"],
    salts: Int[Array, " entries"],
    counts: Int[Array, " entries"],
) -> Chain:
    """The nodes of each prompt's first blocks, as far as they are known.

    Args:
      index: the index.
      tokens: whole blocks of each prompt.
      salts: of each prompt.
      counts: blocks of each that are looked up.
    """
    nodes, blocks = index.parents.shape[0], tokens.shape[1]
    which, tags = hash_prefixes(tokens, salts)
    buckets = (which % (index.buckets.shape[0] // WAYS)).astype(jnp.int32) * WAYS
    candidates = rows_of(index.buckets, buckets[..., None] + jnp.arange(WAYS, dtype=jnp.int32)[None, None])
    hits = (candidates < nodes) & (rows_of(index.tags, candidates) == tags[..., None])
    way = jnp.argmax(hits, axis=-1, keepdims=True)
    found = jnp.take_along_axis(jnp.where(hits, candidates, nodes), way, axis=-1)[..., 0]
    above = jnp.concatenate([jnp.full_like(found[:, :1], nodes), found[:, :-1]], axis=1)
    number = jnp.arange(blocks, dtype=jnp.int32)[None]
    right = (
        (number < counts[:, None])
        & (found < nodes)
        & jnp.all(rows_of(index.tokens, found) == tokens, axis=-1)
        & (rows_of(index.parents, found, -1) == above)
        & ((number > 0) | (rows_of(index.salts, found) == salts[:, None]))
    )
    num_found = jnp.sum(jnp.cumprod(right, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    return Chain(jnp.where(number < num_found[:, None], found, nodes), num_found, buckets, tags)


def hash_prefixes(
    tokens: Int[Array, "entries blocks block"], salts: Int[Array, " entries"]
) -> tuple[UInt32[Array, "entries blocks"], UInt32[Array, "entries blocks"]]:
    """Two hashes of each block and all before it."""
    step = jnp.uint32(_SEEDS[0])
    offset = jnp.arange(tokens.shape[2], dtype=jnp.uint32)[None, None] * step
    number = _mix(jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.uint32)[None] * step) | jnp.uint32(1)
    hashes = []
    for seed in _SEEDS[1:]:
        words = _mix(tokens.astype(jnp.uint32) + (offset + jnp.uint32(seed)))
        block = _mix(jnp.sum(words, axis=-1, dtype=jnp.uint32))
        chain = jnp.cumsum(block * number, axis=1, dtype=jnp.uint32)
        hashes.append(_mix(chain + _mix(salts.astype(jnp.uint32) + jnp.uint32(seed))[:, None] + number))
    return hashes[0], hashes[1]


def _mix(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's finalizer."""
    words = (words ^ (words >> 16)) * jnp.uint32(_SEEDS[1])
    words = (words ^ (words >> 13)) * jnp.uint32(_SEEDS[2])
    return words ^ (words >> 16)


# Recording --------------------------------------------------------------------------------


def extend_chain(
    index: PrefixIndex,
    chain: Chain,
    tokens: Int[Array, "blocks block"],
    salt: Int[Array, ""],
    pages: Int[Array, "blocks held"],
) -> tuple[PrefixIndex, Int[Array, "blocks held"]]:
    """Hangs new nodes below those found, and gives pages to nodes that lack them.

    Args:
      index: the index.
      chain: what `look_up` found of this one prompt.
      tokens: its blocks.
      salt: its salt.
      pages: pages that nodes may hold, none of them recorded; `num_pages` for none.

    Returns:
      The index, and those of the pages that it took; `num_pages` for the others.
    """
    nodes, held = index.pages.shape
    number = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    known, num_known = chain.nodes[0], chain.num_found[0]
    num_pages = index.holders.shape[0]
    has_page = jnp.any(pages < num_pages, axis=1)
    # A chain ends with a block that has a page, and where nodes or places in a bucket run out.
    nth = number - num_known
    asked = (nth >= 0) & (number < _last(has_page)) & (nth < index.num_free_nodes)
    fresh = rows_of(index.free_nodes, jnp.where(asked, index.num_free_nodes - 1 - nth, nodes), nodes)
    buckets, places = _place(index.buckets, chain.buckets[0], fresh, nodes)
    placed = jnp.cumprod((nth < 0) | (places < buckets.shape[0]), dtype=jnp.int32) > 0
    kept = asked & placed
    kept &= number < _last(kept & has_page)
    buckets = buckets.at[jnp.where(kept, buckets.shape[0], places)].set(nodes, mode="drop")
    node = jnp.where(kept, fresh, known)
    made = jnp.where(kept, fresh, nodes)
    above = jnp.concatenate([jnp.full(1, nodes, jnp.int32), node[:-1]])
    missing = rows_of(index.pages, node, 0) == num_pages
    takes = missing & (pages < num_pages) & (node < nodes)[:, None]
    slot = jnp.arange(held, dtype=jnp.int32)
    holder = jnp.where(takes, node[:, None] * held + slot[None], nodes * held)
    at = jnp.where(takes, node[:, None], nodes)
    taken = jnp.where(takes, pages, num_pages)
    index = replace(
        index,
        tokens=index.tokens.at[made].set(tokens, mode="drop"),
        salts=index.salts.at[made].set(salt, mode="drop"),
        tags=index.tags.at[made].set(chain.tags[0], mode="drop"),
        parents=index.parents.at[made].set(above, mode="drop"),
        children=index.children.at[jnp.where(kept, above, nodes)].add(1, mode="drop"),
        places=index.places.at[made].set(places, mode="drop"),
        pages=index.pages.at[at, slot].set(pages, mode="drop"),
        buckets=buckets,
        num_free_nodes=index.num_free_nodes - jnp.sum(kept, dtype=jnp.int32),
        holders=index.holders.at[taken].set(holder, mode="drop"),
    )
    return index, taken


def _last(blocks: Bool[Array, " blocks"]) -> Int[Array, ""]:
    """One more than the number of the last that is marked; 0 without one."""
    return jnp.max(jnp.where(blocks, jnp.arange(1, blocks.shape[0] + 1, dtype=jnp.int32), 0))


def _place(
    buckets: Array, first: Int[Array, " blocks"], fresh: Int[Array, " blocks"], nodes: int
) -> tuple[Array, Int[Array, " blocks"]]:
    """Enters each new node in its bucket; returns where, past the end where the bucket is full.

    Several may want one place: the least of them has it, the others try the next.
    """
    end = buckets.shape[0]

    def try_way(way: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        buckets, places = carry
        open_ = (fresh < nodes) & (places == end)
        at = jnp.where(open_, first + way, end)
        at = jnp.where(rows_of(buckets, at) == nodes, at, end)
        buckets = buckets.at[at].min(fresh, mode="drop")
        return buckets, jnp.where((at < end) & (rows_of(buckets, at) == fresh), at, places)

    return control_flow.fori_loop(0, WAYS, try_way, (buckets, jnp.full_like(fresh, end)))


# Letting go -------------------------------------------------------------------------------


def let_go(index: PrefixIndex, pages: Int[Array, " some"]) -> PrefixIndex:
    """Takes pages from their nodes, and with them the nodes that have neither a page nor a child left.

    Args:
      index: the index.
      pages: each once, at most `CHUNK`; `num_pages` for none.
    """
    nodes, held = index.pages.shape
    holder = rows_of(index.holders, pages, nodes * held)
    node, slot = holder // held, holder % held
    index = replace(
        index,
        pages=index.pages.at[node, slot].set(index.holders.shape[0], mode="drop"),
        holders=index.holders.at[after(pages, holder)].set(nodes * held, mode="drop"),
    )
    some = pages.shape[0]
    # Nodes of one page are named once, as pages are.
    bare = _is_bare(index, node) if held == 1 else _is_bare(index, node) & _is_first(node)
    parent = rows_of(index.parents, node, nodes)
    is_above = bare[None, :] & (parent[:, None] == node[None, :])
    # At most one is; a minimum takes a fraction of the time of `argmax`.
    up = jnp.min(jnp.where(is_above, jnp.arange(some, dtype=jnp.int32)[None], some), axis=1)
    num_bare_below = jnp.zeros(some, jnp.int32).at[jnp.where(bare, up, some)].add(1, mode="drop")
    # One stays for a child that is not bare, and for one that stays. Twice as far up in each round.
    stays = ~bare | (rows_of(index.children, node) > num_bare_below)
    ancestor = up
    for _ in range((some - 1).bit_length()):
        stays = stays.at[ancestor].max(stays & bare, mode="drop")
        ancestor = rows_of(ancestor, ancestor, some)
    goes = bare & ~stays
    index = _remove(index, jnp.where(goes, node, nodes))
    above = jnp.where(goes & ~rows_of(goes, up, False), parent, nodes)

    # Further up there may be nodes that were only there for those below them.
    def is_left(carry: tuple[PrefixIndex, Array]) -> Array:
        return jnp.any(carry[1] < nodes)

    def remove_above(carry: tuple[PrefixIndex, Array]) -> tuple[PrefixIndex, Array]:
        index, node = carry
        parent = rows_of(index.parents, node, nodes)
        index = _remove(index, node)
        return index, _unneeded(index, parent)

    return control_flow.while_loop(is_left, remove_above, (index, _unneeded(index, above)))[0]


def _is_bare(index: PrefixIndex, node: Int[Array, " some"]) -> Bool[Array, " some"]:
    """Whether a node has no page; False for an id of `nodes`."""
    return jnp.all(rows_of(index.pages, node, 0) == index.holders.shape[0], axis=1)


def _is_first(node: Int[Array, " some"]) -> Bool[Array, " some"]:
    """Whether none before it is the same."""
    number = jnp.arange(node.shape[0], dtype=jnp.int32)
    first = jnp.min(jnp.where(node[:, None] == node[None, :], number[None, :], node.shape[0]), axis=1)
    return first == number


def _unneeded(index: PrefixIndex, node: Int[Array, " some"]) -> Int[Array, " some"]:
    """Those of the nodes, each once, that have neither a page nor a child."""
    goes = _is_bare(index, node) & (rows_of(index.children, node, 1) == 0) & _is_first(node)
    return jnp.where(goes, node, index.parents.shape[0])


def _remove(index: PrefixIndex, node: Int[Array, " some"]) -> PrefixIndex:
    """Takes nodes out of the index, each once."""
    nodes = index.parents.shape[0]
    goes = node < nodes
    place = jnp.where(goes, rows_of(index.places, node), index.buckets.shape[0])
    rank = jnp.cumsum(goes, dtype=jnp.int32)
    height = jnp.where(goes, index.num_free_nodes + rank - 1, nodes)
    return replace(
        index,
        children=index.children.at[rows_of(index.parents, node, nodes)].add(-1, mode="drop"),
        buckets=index.buckets.at[place].set(nodes, mode="drop"),
        free_nodes=index.free_nodes.at[height].set(node, mode="drop"),
        num_free_nodes=index.num_free_nodes + rank[-1],
    )


def renumber_pages(index: PrefixIndex, target: Int[Array, " pages"]) -> PrefixIndex:
    """Each recorded page gets its `target` for an id."""
    num_pages = target.shape[0]
    none = jnp.full_like(index.holders, index.pages.size)
    return replace(
        index,
        pages=rows_of(target, index.pages, num_pages),
        holders=none.at[target].set(index.holders, mode="drop"),
        queue=rows_of(target, index.queue, num_pages),
        queued_at=jnp.full_like(index.queued_at, -1).at[target].set(index.queued_at, mode="drop"),
    )
