"""A corrupted index of prefixes is recognised, with the node or page that is wrong."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import jaxkv
from jaxkv import CacheCorruptedError
from tests import jitted
from tests.texts import TEXTS, Server

A, B, C, D = ([10 * n + i for i in range(4)] for n in range(1, 5))


@pytest.fixture(scope="module")
def sound():
    """Chains [A B C] of nodes 0, 1 and 2, [A D] with node 3 below node 0, and [D] of node 4, salt 5.

    Pages 0 to 4 hold them. Slot 2 uses the first two of [A B C]; those of the others are reclaimable.
    """
    server = Server()
    server.write(0, A + B + C)
    server.leave(0)
    assert server.match(0, A + D) == 4
    server.write(0, D)
    server.write(1, D, salt=5)
    assert server.match(2, A + B + C[:1]) == 8
    server.leave(0, 1)
    assert server.table.prefixes.parents[:5].tolist() == [8, 0, 1, 0, 8]
    assert server.table.prefixes.pages[:5, 0].tolist() == [0, 1, 2, 3, 4]
    assert server.table.prefixes.queue_ends.tolist()[1] > 0
    return jax.device_get(server.cache)


def test_a_sound_index_passes(sound):
    jaxkv.check_invariants(sound)


CORRUPTIONS = {
    # what: (field of the index, index, its new value or how it changes, what the error must say)
    "more free nodes than there are": ("num_free_nodes", ..., 9, r"num_free_nodes 9 is not in 0\.\.8"),
    "fewer free nodes than none": ("num_free_nodes", ..., -1, "num_free_nodes -1"),
    "a node free twice": ("free_nodes", 0, 6, "free nodes has a node twice"),
    "a free node that there is not": ("free_nodes", 0, 8, "one out of range"),
    "a negative free node": ("free_nodes", 0, -1, "one out of range"),
    "a live node that is free": ("free_nodes", 0, 4, "node 4 is free, but has a page or a child"),
    "a free node that is lost": ("num_free_nodes", ..., 2, "node [5-7] has neither a page nor a child"),
    "a parent that there is not": ("parents", 1, 9, r"parents, entry 1: 9 is not in 0\.\.8"),
    "a negative parent": ("parents", 1, -1, "parents, entry 1: -1"),
    "a page of a node that there is not": ("pages", (1, 0), 9, r"pages, entry 1: 9 is not in 0\.\.8"),
    "a negative page of a node": ("pages", (1, 0), -1, "pages, entry 1: -1"),
    "a node in a bucket that there is not": ("buckets", 0, 9, r"buckets, entry 0: 9 is not in 0\.\.8"),
    "a holder without the page": ("holders", 2, 1, "page 2: recorded at 1, but the nodes have it at 2"),
    "a page that does not know of its node": ("holders", 1, 8, "page 1"),
    "a page recorded nowhere": ("holders", 6, 6, "page 6"),
    "a node that lost its page": ("pages", (2, 0), 8, "page 2: recorded at 2, but the nodes have it at 8"),
    "a child too many": ("children", 0, 3, "node 0: 3 children, but 2 nodes name it"),
    "a child too few": ("children", 1, 0, "node 1: 0 children, but 1 nodes name it"),
    "a parent that is free": ("parents", 4, 6, "node 6 is free, but has a page or a child"),
    "a node at another place": ("places", 3, 0, "node 3 stands at .* of the buckets, not at its place"),
    "another salt than the parent's": ("salts", 1, 5, "node 1: its salt is 5, that of its parent 0"),
    "another salt than the children's": ("salts", 0, 1, "node 1: its salt is 0, that of its parent 1"),
    "a page that is not reclaimable, in the queue": ("queued_at", 0, 0, "page 0: 1 rows name it"),
    "a free page in the queue": ("queued_at", 7, 0, "page 7: 0 rows name it"),
    "a reclaimable page outside the queue": ("queued_at", 2, -1, "page 2: 0 rows name it"),
    "a queue that ends before it begins": ("queue_ends", 0, 16, "the queue goes from 16 to"),
    "a queue that is too long": ("queue_ends", 1, 17, "to 17, of 16 places"),
    "a queue that begins too late": ("queue_ends", 0, lambda ends: ends + 4, "page 2 does not stand"),
    "a page at another's place": ("queued_at", 2, lambda at: at + 1, "page 2 does not stand at its place"),
    "another page at its place": ("queue", ..., 7, "page [2-4] does not stand at its place"),
    "too many reclaimable pages": (
        "num_reclaimable",
        ...,
        4,
        "num_reclaimable is 4, but the index alone .* 3",
    ),
    "intact tokens below none": ("intact", 2, -1, "slot 2: -1 intact tokens"),
}


def corrupted(cache, field, index, value):
    array = jnp.asarray(getattr(cache.table.prefixes, field))
    value = value(array[index]) if callable(value) else value
    prefixes = replace(cache.table.prefixes, **{field: array.at[index].set(value)})
    return replace(cache, table=replace(cache.table, prefixes=prefixes))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupted_index_is_recognised(corruption, sound):
    field, index, value, message = CORRUPTIONS[corruption]
    with pytest.raises(CacheCorruptedError, match=message):
        jaxkv.check_invariants(corrupted(sound, field, index, value))


def test_a_page_of_two_nodes_is_recognised(sound):
    """Also where the page knows of one of them."""
    with pytest.raises(CacheCorruptedError, match=r"5 pages stand in nodes, but 4 are recorded|page"):
        jaxkv.check_invariants(corrupted(sound, "pages", (1, 0), 2))
    table = sound.table
    twice = replace(
        table.prefixes,
        pages=jnp.asarray(table.prefixes.pages).at[0, 0].set(1),
        holders=jnp.asarray(table.prefixes.holders).at[0].set(8),
    )
    refcounts = jnp.asarray(table.refcounts).at[0].add(-1)
    with pytest.raises(CacheCorruptedError, match="5 pages stand in nodes, but 4 are recorded"):
        jaxkv.check_invariants(replace(sound, table=replace(table, prefixes=twice, refcounts=refcounts)))


def test_a_node_entered_in_two_places_is_recognised(sound):
    empty = int((sound.table.prefixes.buckets == 8).argmax())
    with pytest.raises(CacheCorruptedError, match=r"node 3 stands|6 places of buckets are taken, by 5 nodes"):
        jaxkv.check_invariants(corrupted(sound, "buckets", empty, 3))


def test_a_circle_of_nodes_is_recognised(sound):
    """Nodes 0 and 1 are each other's parents, and their children are counted so."""
    cache = corrupted(sound, "parents", 0, 1)
    cache = corrupted(cache, "children", 1, 2)
    with pytest.raises(CacheCorruptedError, match="node 0: its chain has no first node"):
        jaxkv.check_invariants(cache)


def test_a_recorded_page_counts_as_an_owner(sound):
    table = sound.table
    fewer = replace(table, refcounts=jnp.asarray(table.refcounts).at[0].add(-1))
    with pytest.raises(CacheCorruptedError, match="page 0: refcount 1, but 1 rows name it, and the index"):
        jaxkv.check_invariants(replace(sound, table=fewer))


def test_an_index_that_the_config_does_not_have_is_recognised(sound):
    without = replace(TEXTS, prefix_cache=False)
    with pytest.raises(CacheCorruptedError, match=r"has an index of prefixes, .*prefix_cache=False"):
        jaxkv.check_invariants(replace(sound, config=without))
    cache = replace(jitted.init(without), config=TEXTS)
    with pytest.raises(CacheCorruptedError, match=r"has no index of prefixes, .*prefix_cache=True"):
        jaxkv.check_invariants(cache)


def test_an_index_of_other_sizes_is_recognised(sound):
    prefixes = replace(sound.table.prefixes, queue=sound.table.prefixes.queue[:-1])
    with pytest.raises(CacheCorruptedError, match=r"table\.prefixes\.queue is int32\[15\]"):
        jaxkv.check_invariants(replace(sound, table=replace(sound.table, prefixes=prefixes)))
