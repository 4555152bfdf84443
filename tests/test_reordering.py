"""Beams that trade places: pages change owners, none is copied, lost or released twice."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Status
from jaxkv.policies import HeavyHitter, SlidingWindow
from tests import jitted
from tests.caches import ONE_SEQUENCE, SMALL, filled, ints
from tests.edges import at_every_edge, brought_to
from tests.twin import Twin

OK, INVALID_SEQ, PADDING = Status.OK, Status.INVALID_SEQ, Status.PADDING
LARGEST = 2**31 - 1


@at_every_edge
def test_every_slot_follows_the_one_before_it_and_writes_go_on(situation, config):
    twin = brought_to(situation, config)
    slots = np.arange(config.max_seqs)
    twin.reorder(slots, np.roll(slots, 1))
    twin.extend(slots, [1] * config.max_seqs)
    twin.reorder(slots, [0] * config.max_seqs)
    twin.extend(slots, [2] * config.max_seqs)


def test_two_slots_trade_places_and_no_page_moves():
    twin = Twin(SMALL)
    twin.extend([0, 1], [6, 3])
    first, second, pool = twin.pages(0), twin.pages(1), jax.device_get(twin.cache.pool)
    assert twin.reorder([0, 1], [1, 0]) == [OK, OK]
    assert (twin.pages(0), twin.pages(1)) == (second, first)
    np.testing.assert_array_equal(twin.cache.pool.k, pool.k)


def test_every_slot_forks_one_where_no_page_is_free():
    twin = Twin(SMALL)
    twin.extend([0, 1, 2, 3], [8, 7, 6, 5])
    assert twin.oracle.num_free == 0
    assert twin.reorder([0, 1, 2, 3], [2, 2, 2, 2]) == [OK] * 4
    assert twin.oracle.num_free == 6
    assert twin.cache.stats.total_deallocations == 6
    assert twin.cache.table.refcounts.max() == 4


def test_a_slot_that_is_its_own_parent_stays_even_if_empty_and_leaves_batches_as_good_as_they_were():
    twin = Twin(SMALL)
    twin.extend([0, 1], [6, 3])
    before = twin.cache.table.fingerprint.tolist()
    assert twin.reorder([0, 1, 2], [0, 1, 2]) == [OK, OK, OK]
    assert twin.cache.table.fingerprint.tolist() == before


def test_an_empty_slot_becomes_a_fork():
    twin = Twin(SMALL)
    twin.extend([0], [6])
    assert twin.reorder([3, 0], [0, 0]) == [OK, OK]
    assert twin.pages(3) == twin.pages(0)


def test_what_cannot_be_done_is_refused_and_the_slot_keeps_its_tokens():
    twin = Twin(SMALL)
    twin.extend([0, 1], [6, 3])
    assert twin.reorder([1, -1, 0, 4, 0], [3, 0, -1, 0, LARGEST]) == [
        INVALID_SEQ,  # an empty parent
        PADDING,
        PADDING,
        INVALID_SEQ,
        INVALID_SEQ,
    ]
    assert twin.cache.table.lengths.tolist() == [6, 3, 0, 0]


def test_a_slot_named_twice_follows_the_first_acceptable_entry():
    twin = Twin(SMALL)
    twin.extend([0, 1, 2], [6, 3, 5])
    assert twin.reorder([0, 0, 0, 1], [3, 1, 2, 0]) == [INVALID_SEQ, OK, INVALID_SEQ, OK]
    assert twin.cache.table.lengths.tolist() == [3, 6, 5, 0]


def test_a_cache_of_one_slot_has_one_order():
    twin = Twin(ONE_SEQUENCE)
    twin.extend([0], [5])
    assert twin.reorder([0, 0], [0, 1]) == [OK, INVALID_SEQ]


@pytest.mark.parametrize("chunk", [1, 8])
def test_long_rows_take_several_steps_and_are_swapped_as_short_ones_are(chunk, monkeypatch, traced_anew):
    monkeypatch.setattr("jaxkv.pages._CHUNK", chunk)
    cache, _ = filled(replace(SMALL, num_pages=16), (16, 3, 7))
    rows = np.asarray(cache.table.pages)
    cache, status = jitted.reorder(cache, ints(0, 1, 2), ints(1, 0, 1))
    assert status.tolist() == [OK, OK, OK]
    np.testing.assert_array_equal(cache.table.pages[:3], rows[[1, 0, 1]])
    assert cache.table.num_free == 16 - 5
    jaxkv.check_invariants(cache)


def test_pages_that_stand_in_different_columns_survive_their_first_owner(monkeypatch, traced_anew):
    """After a window gave up slot 1's first pages, the two share pages, but not at the same columns."""
    cache, _ = filled(SMALL, (12,), policy=SlidingWindow(window=5, sinks=0))
    cache, _ = jitted.fork(cache, ints(0), ints(1))
    cache, dropped = jitted.evict(cache, ints(1))
    assert dropped.tolist() == [8]
    monkeypatch.setattr("jaxkv.pages._CHUNK", 1)
    cache, _ = jitted.reorder(cache, ints(0), ints(1))
    assert cache.table.pages[0].tolist() == cache.table.pages[1].tolist()
    jaxkv.check_invariants(cache)


def test_a_policys_state_follows():
    cache, _ = filled(SMALL, (6, 3), policy=HeavyHitter(budget=6, recent=3))
    assert cache.policy is not None
    mass = cache.policy.values["mass"]
    marked = jnp.arange(4, dtype=jnp.float32).reshape(-1, 1, 1, 1) + jnp.zeros_like(mass)
    cache = replace(cache, policy=replace(cache.policy, values={"mass": marked}))
    cache, _ = jitted.reorder(cache, ints(0, 1, 2), ints(1, 0, 3))
    assert cache.policy.values["mass"][:, 0, 0, 0].tolist() == [1, 0, 2, 3]


def test_lengths_are_those_of_every_slot_and_outlive_a_donated_cache():
    cache, _ = filled(SMALL, (6, 3))
    lengths = jaxkv.lengths(cache)
    jax.jit(jaxkv.free, donate_argnames="cache")(cache, ints(0))
    assert lengths.tolist() == [6, 3, 0, 0]
    assert lengths.dtype == jnp.int32
