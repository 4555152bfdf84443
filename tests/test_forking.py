"""Sharing pages, and copying a tail page on the first write to it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv import Status
from tests.caches import ONE_SEQUENCE, PAGE_OF_ONE, SMALL
from tests.edges import at_every_edge, brought_to
from tests.twin import Twin

OK, INVALID_SEQ, OCCUPIED, PADDING = Status.OK, Status.INVALID_SEQ, Status.OCCUPIED, Status.PADDING
LARGEST = 2**31 - 1


@at_every_edge
def test_fork_of_the_first_sequence_into_every_slot(situation, config):
    twin = brought_to(situation, config)
    slots = range(config.max_seqs)
    twin.fork([0] * config.max_seqs, slots)
    twin.extend(slots, [1] * config.max_seqs)
    twin.free([0])
    twin.extend(slots, [2] * config.max_seqs)


@at_every_edge
def test_forks_of_every_kind_in_one_call(situation, config):
    twin = brought_to(situation, config)
    last = config.max_seqs - 1
    twin.fork([-1, 0, 0, last, 0], [0, last, last, 0, config.max_seqs])
    twin.truncate([last], [1])
    twin.extend([last, 0], [2, 2])


def test_a_fork_shares_every_page_and_takes_none():
    twin = Twin(SMALL)
    twin.extend([0], [6])
    assert twin.fork([0], [3]) == [OK]
    assert twin.pages(3) == twin.pages(0)
    assert twin.oracle.num_free == 6


def test_no_k_or_v_moves():
    twin = Twin(SMALL)
    twin.extend([0], [6])
    before = jax.device_get(twin.cache.pool)
    twin.fork([0, 0], [1, 2])
    np.testing.assert_array_equal(twin.cache.pool.k, before.k)
    np.testing.assert_array_equal(twin.cache.pool.v, before.v)


def test_a_parent_may_have_many_children_in_one_call():
    twin = Twin(SMALL)
    twin.extend([2], [5])
    assert twin.fork([2, 2, 2], [0, 1, 3]) == [OK, OK, OK]
    assert twin.cache.table.refcounts[:2].tolist() == [4, 4]


def test_the_first_writer_copies_the_tail_and_the_last_does_not():
    twin = Twin(SMALL)
    twin.extend([0], [6])
    twin.fork([0, 0], [1, 2])
    for slot, copies in ((1, 1), (0, 2), (2, 2)):
        twin.extend([slot], [1])
        assert twin.cache.stats.copy_on_write_copies == copies
    assert twin.pages(2) == [0, 1]  # the original, its own now


def test_all_owners_write_in_one_call_and_the_original_goes_back():
    twin = Twin(SMALL)
    twin.extend([0], [6])
    twin.fork([0, 0], [1, 2])
    twin.extend([0, 1, 2], [1, 1, 1])
    assert twin.cache.stats.copy_on_write_copies == 3
    assert twin.oracle.num_free == 8 - 4
    assert twin.cache.table.refcounts[1] == 0


def test_a_full_tail_is_never_copied():
    twin = Twin(SMALL)
    twin.extend([0], [8])
    twin.fork([0], [1])
    twin.extend([0, 1], [1, 1])
    assert twin.cache.stats.copy_on_write_copies == 0
    assert twin.oracle.num_free == 4


def test_pages_of_one_token_are_never_copied():
    twin = Twin(PAGE_OF_ONE)
    twin.extend([0], [3])
    twin.fork([0], [1])
    twin.extend([0, 1], [1, 1])
    assert twin.cache.stats.copy_on_write_copies == 0


def test_a_fork_of_a_fork_shares_with_both():
    twin = Twin(SMALL)
    twin.extend([0], [6])
    twin.fork([0], [1])
    twin.extend([1], [4])
    twin.fork([1], [2])
    twin.free([1])
    twin.extend([2, 0], [3, 3])


def test_a_fork_without_a_page_for_its_copy_is_refused_and_unchanged():
    twin = Twin(SMALL)
    twin.extend([0, 2], [6, 16])
    twin.fork([0], [1])
    twin.extend([3], [8])
    assert twin.oracle.num_free == 0
    assert twin.extend([1, 0], [1, 1]) == [Status.OUT_OF_PAGES, Status.OUT_OF_PAGES]
    twin.free([0])
    assert twin.extend([1], [1]) == [OK]  # the tail is its own now


def test_a_child_takes_its_parents_position():
    twin = Twin(SMALL)
    twin.extend([0], [6])
    twin.fork([0], [1])
    assert twin.cache.table.positions[1] == 6


def test_an_occupied_child_is_refused():
    twin = Twin(SMALL)
    twin.extend([0, 1], [5, 1])
    assert twin.fork([0], [1]) == [OCCUPIED]


def test_an_empty_parent_is_refused():
    assert Twin(SMALL).fork([0], [1]) == [INVALID_SEQ]


def test_a_child_named_twice_goes_to_the_first_acceptable_entry():
    twin = Twin(SMALL)
    twin.extend([0, 1], [5, 2])
    assert twin.fork([2, 1, 0], [3, 3, 3]) == [INVALID_SEQ, OK, OCCUPIED]
    assert twin.cache.table.lengths[3] == 2


def test_parents_are_read_as_before_the_call():
    twin = Twin(SMALL)
    twin.extend([0], [5])
    assert twin.fork([0, 1], [1, 2]) == [OK, INVALID_SEQ]


def test_a_sequence_cannot_be_its_own_child():
    twin = Twin(SMALL)
    twin.extend([0], [5])
    assert twin.fork([0, 1], [0, 1]) == [OCCUPIED, OCCUPIED]


def test_padding_and_slots_beyond_the_table_do_nothing():
    twin = Twin(SMALL)
    twin.extend([0], [5])
    statuses = twin.fork([-1, 0, 4, 0, -1], [1, -1, 1, LARGEST, LARGEST])
    assert statuses == [PADDING, PADDING, INVALID_SEQ, INVALID_SEQ, PADDING]


def test_one_sequence_has_nobody_to_fork_into():
    twin = Twin(ONE_SEQUENCE)
    twin.extend([0], [5])
    assert twin.fork([0, 0], [0, 1]) == [OCCUPIED, INVALID_SEQ]


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_fork_then_write(self):
        allocate, fork = self.variant(jaxkv.allocate), self.variant(jaxkv.fork)
        cache, _ = allocate(jaxkv.init(SMALL), jnp.array([0]), jnp.array([1]))
        cache, status = fork(cache, jnp.array([0, 0, 3]), jnp.array([1, 2, 2]))
        assert status.tolist() == [OK, OK, INVALID_SEQ]
        cache, batch = allocate(cache, jnp.array([2]), jnp.array([1]))
        assert batch.page_ids.tolist() == [[1]]
        assert batch.offsets.tolist() == [[1]]
        assert cache.table.refcounts[:3].tolist() == [2, 1, 0]
        jaxkv.check_invariants(cache)
