"""Who owns which page: allocate, free, truncate."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized
from jax.extend.core import jaxprs_in_params

import jaxkv
from jaxkv import CacheConfig, Status
from tests import jitted
from tests.caches import ONE_SEQUENCE, PAGE_OF_ONE, SMALL, ints
from tests.edges import at_every_edge, brought_to
from tests.twin import Twin

OK, OUT_OF_PAGES, TOO_LONG = Status.OK, Status.OUT_OF_PAGES, Status.SEQUENCE_TOO_LONG
INVALID_SEQ, INVALID_LENGTH, PADDING = Status.INVALID_SEQ, Status.INVALID_LENGTH, Status.PADDING
LARGEST = 2**31 - 1
FOUR_PAGES = replace(SMALL, num_pages=4)


# At every edge, against the oracle --------------------------------------------------------------


@at_every_edge
def test_one_more_token_for_every_sequence(situation, config):
    twin = brought_to(situation, config)
    twin.extend(range(config.max_seqs), [1] * config.max_seqs)


@at_every_edge
def test_one_more_page_and_a_token_for_the_largest_slot(situation, config):
    twin = brought_to(situation, config)
    twin.extend([config.max_seqs - 1], [config.page_size + 1])


@at_every_edge
def test_requests_of_every_kind_in_one_call(situation, config):
    twin = brought_to(situation, config)
    last = config.max_seqs - 1
    twin.extend([-1, 0, 0, config.max_seqs, last], [1, 2, 1, 1, 4])


@at_every_edge
def test_free_of_all_with_padding_and_repeats(situation, config):
    twin = brought_to(situation, config)
    last = config.max_seqs - 1
    twin.free([last, -1, 0, last, config.max_seqs])
    twin.free(range(config.max_seqs))
    assert twin.oracle.num_free == config.num_pages


@at_every_edge
def test_truncate_by_one_token_and_to_a_page_boundary(situation, config):
    twin = brought_to(situation, config)
    slots = range(config.max_seqs)
    twin.truncate(slots, [twin.oracle.sequences[slot].length - 1 for slot in slots])
    twin.truncate(slots, [config.page_size] * len(slots))
    twin.extend(slots, [1] * len(slots))


@at_every_edge
def test_truncate_with_repeats_padding_and_nonsense(situation, config):
    twin = brought_to(situation, config)
    twin.truncate([0, 0, -1, config.max_seqs, 0], [3, 2, 0, 0, LARGEST])
    twin.truncate([0, 0], [-1, LARGEST])
    twin.truncate([0, 0], [1, 0])


# allocate ---------------------------------------------------------------------------------------


def test_pages_come_in_ascending_order_from_an_empty_cache():
    twin = Twin(SMALL)
    twin.extend([2, 0], [5, 3])
    assert (twin.pages(2), twin.pages(0)) == ([0, 1], [2])


def test_a_tail_page_is_filled_before_a_page_is_taken():
    twin = Twin(SMALL)
    for length in range(1, 10):
        assert twin.extend([1], [1]) == [OK]
        assert twin.oracle.num_free == SMALL.num_pages - -(-length // 4)


def test_a_page_is_taken_exactly_at_its_boundary():
    twin = Twin(SMALL)
    twin.extend([0], [4])
    assert twin.pages(0) == [0]
    twin.extend([0], [1])
    assert twin.pages(0) == [0, 1]


def test_a_page_given_back_is_the_next_to_be_handed_out():
    twin = Twin(SMALL)
    twin.extend([0, 1], [4, 4])
    twin.free([0])
    twin.extend([2], [1])
    assert twin.pages(2) == [0]


def test_all_or_nothing_for_each_sequence():
    twin = Twin(SMALL)
    assert twin.extend([0, 1], [16, 13]) == [OK, OK]
    assert twin.oracle.num_free == 0
    twin.truncate([1], [8])
    assert twin.extend([2], [9]) == [OUT_OF_PAGES]  # three pages, two are there
    assert twin.oracle.num_free == 2
    assert twin.extend([2], [8]) == [OK]


def test_a_request_that_does_not_fit_holds_back_every_later_one_that_needs_a_page():
    twin = Twin(SMALL)
    twin.extend([0, 1], [15, 10])  # seven pages
    assert twin.extend([2, 3, 0, 1], [5, 1, 1, 2]) == [OUT_OF_PAGES, OUT_OF_PAGES, OK, OK]


def test_an_earlier_entry_is_served_first():
    twin = Twin(FOUR_PAGES)
    assert twin.extend([3, 1, 2, 0], [4, 8, 4, 1]) == [OK, OK, OK, OUT_OF_PAGES]
    assert twin.pages(3) + twin.pages(1) + twin.pages(2) == [0, 1, 2, 3]


def test_invalid_and_too_long_entries_hold_nothing_back():
    twin = Twin(FOUR_PAGES)
    assert twin.extend([9, 0, 1, 1, 2], [4, 17, 4, 2, 12]) == [INVALID_SEQ, TOO_LONG, OK, INVALID_SEQ, OK]


def test_a_row_can_be_filled_to_its_last_place_and_no_further():
    twin = Twin(SMALL)
    assert twin.extend([0], [17]) == [TOO_LONG]
    assert twin.extend([0], [16]) == [OK]
    assert twin.extend([0, 1], [1, 1]) == [TOO_LONG, OK]
    assert twin.extend([0], [0]) == [OK]


def test_a_refused_sequence_keeps_its_length_positions_and_pages():
    twin = Twin(ONE_SEQUENCE)
    twin.extend([0], [11])
    before = jax.device_get(twin.cache.table)
    assert twin.extend([0], [3]) == [TOO_LONG]
    chex.assert_trees_all_equal(jax.device_get(twin.cache.table), before)


def test_a_slot_named_again_is_invalid_whatever_became_of_it_before():
    twin = Twin(SMALL)
    assert twin.extend([0, 0, 1, 1, 1], [-1, 1, 0, 1, 0]) == [
        INVALID_LENGTH,
        INVALID_SEQ,
        OK,
        INVALID_SEQ,
        INVALID_SEQ,
    ]


def test_negative_slots_may_repeat():
    assert Twin(SMALL).extend([-1, -1, -5], [1, 1, -1]) == [PADDING, PADDING, PADDING]


@pytest.mark.parametrize("slot", [4, 5, 64, LARGEST])
def test_a_slot_beyond_the_table_is_invalid(slot):
    assert Twin(SMALL).extend([slot, 3], [1, 1]) == [INVALID_SEQ, OK]


def test_rows_past_the_token_axis_make_a_request_invalid():
    twin = Twin(SMALL)
    assert twin.extend([-1, 1, 2, 0, 3], [35, 6, 1, 0, 4]) == [
        PADDING,
        INVALID_LENGTH,
        INVALID_LENGTH,
        OK,
        INVALID_LENGTH,
    ]


def test_counts_that_overflow_int32_together_wrap_around_nowhere():
    twin = Twin(SMALL)
    requests = [LARGEST, LARGEST, 3, LARGEST, 1]
    assert twin.extend([0, -1, 1, 2, 3], requests) == [
        INVALID_LENGTH,
        PADDING,
        INVALID_LENGTH,
        INVALID_LENGTH,
        INVALID_LENGTH,
    ]


def test_negative_counts_take_no_rows():
    twin = Twin(SMALL)
    smallest = -(2**31)
    assert twin.extend([0, 1, 2], [-5, 4, smallest]) == [INVALID_LENGTH, OK, INVALID_LENGTH]


def test_padding_and_refused_entries_take_the_rows_they_asked_for():
    twin = Twin(SMALL)
    twin.extend([-1, 9, 1], [2, 3, 2])
    _, batch = jitted.allocate(twin.cache, ints(-1, 9, 1), ints(2, 3, 2), total_tokens=8)
    assert batch.query_starts.tolist() == [0, 2, 5, 7]
    assert batch.positions.tolist() == [0, 0, 0, 0, 0, 2, 3, 0]


def test_the_token_axis_is_by_default_one_token_an_entry():
    cache = jaxkv.init(SMALL)
    _, batch = jitted.allocate(cache, ints(0, 2, 1), ints(1, 1, 1))
    assert batch.positions.shape == batch.page_ids[0].shape == (3,)
    assert batch.query_starts.tolist() == [0, 1, 2, 3]


def test_a_batch_says_what_was_asked():
    _, batch = jitted.allocate(jaxkv.init(SMALL), ints(2, -1, 0), ints(5, 1, 2), total_tokens=8)
    assert batch.seqs.tolist() == [2, -1, 0]
    assert batch.num_tokens.tolist() == [5, 1, 2]


def test_positions_go_on_where_a_policy_left_them():
    """`positions` may run ahead of `lengths`: new tokens count from the position."""
    twin = Twin(SMALL)
    twin.extend([1], [3])
    twin.advance_position(1, 97)
    twin.extend([1], [2])
    assert twin.cache.table.positions[1] == 102
    twin.fork([1], [0])
    twin.truncate([1], [101])
    assert twin.cache.table.positions[:2].tolist() == [102, 101]
    twin.truncate([1], [0])
    assert twin.cache.table.positions[1] == 0


def test_every_entry_may_need_two_pages_for_two_tokens():
    """The most that a call can hand out: the copy of a tail with one place left, and the next page."""
    twin = Twin(replace(SMALL, num_pages=9), entries=4, total_tokens=8)
    twin.extend([0], [3])
    twin.fork([0, 0, 0], [1, 2, 3])
    assert twin.extend([0, 1, 2, 3], [2, 2, 2, 2]) == [OK, OK, OK, OK]
    assert twin.oracle.num_free == 1


def test_peak_counts_copies_before_their_originals_are_given_back():
    twin = Twin(SMALL)
    twin.extend([0], [2])
    twin.fork([0], [1])
    assert twin.extend([0, 1], [1, 1]) == [OK, OK]  # both copy, the original goes
    stats = jax.device_get(twin.cache.stats)
    assert (stats.current_pages, stats.peak_pages, stats.copy_on_write_copies) == (2, 3, 2)


# free and truncate ------------------------------------------------------------------------------


def test_freeing_twice_gives_back_once():
    twin = Twin(SMALL)
    twin.extend([0, 1], [4, 4])
    twin.free([0, 0])
    twin.free([0])
    assert twin.oracle.num_free == 7


def test_a_shared_page_goes_with_its_last_owner():
    twin = Twin(SMALL)
    twin.extend([0], [6])
    twin.fork([0, 0], [1, 2])
    twin.free([0])
    assert twin.oracle.num_free == 6
    twin.free([1, 2])
    assert twin.oracle.num_free == 8


def test_all_owners_of_a_page_let_go_in_one_call():
    twin = Twin(SMALL)
    twin.extend([0], [6])
    twin.fork([0, 0, 0], [1, 2, 3])
    twin.free([3, 1, 0, 2])
    assert twin.oracle.num_free == 8


def test_truncate_keeps_the_pages_that_hold_a_token():
    twin = Twin(SMALL)
    twin.extend([0], [8])
    twin.truncate([0], [5])
    assert len(twin.pages(0)) == 2
    twin.truncate([0], [4])
    assert len(twin.pages(0)) == 1


def test_truncating_a_fork_leaves_its_parent_alone():
    twin = Twin(SMALL)
    twin.extend([0], [8])
    twin.fork([0], [1])
    twin.truncate([1], [5])
    twin.extend([1], [2])
    assert twin.oracle.sequences[0].length == 8


def test_of_several_lengths_for_one_slot_the_smallest_holds():
    twin = Twin(SMALL)
    twin.extend([0], [8])
    twin.truncate([0, 0, 0], [6, 3, 7])
    assert twin.cache.table.lengths[0] == 3


def test_a_length_that_is_not_shorter_changes_nothing():
    twin = Twin(SMALL)
    twin.extend([0, 1], [4, 3])
    before = jax.device_get(twin.cache.table)
    twin.truncate([0, 0, 1, 1], [4, 5, -1, LARGEST])
    chex.assert_trees_all_equal(jax.device_get(twin.cache.table), before)


def test_a_sequence_truncated_to_zero_starts_over():
    twin = Twin(SMALL)
    twin.extend([0], [6])
    twin.truncate([0], [0])
    assert twin.cache.table.positions[0] == 0
    assert twin.extend([0], [1]) == [OK]


def test_speculative_tokens_rolled_back_and_written_again():
    twin = Twin(SMALL)
    twin.extend([0, 1], [3, 4])
    for accepted in (0, 1, 2):
        lengths = [twin.oracle.sequences[slot].length for slot in (0, 1)]
        twin.extend([0, 1], [3, 3])
        twin.truncate([0, 1], [length + accepted for length in lengths])


# purity and cost --------------------------------------------------------------------------------


def test_a_cache_stays_usable_after_operations_that_do_not_donate_it():
    cache, _ = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(6), total_tokens=6)
    before = jax.device_get(cache)
    for operation in (
        lambda cache: jaxkv.allocate(cache, ints(0), ints(1)),
        lambda cache: jaxkv.free(cache, ints(0)),
        lambda cache: jaxkv.truncate(cache, ints(0), ints(1))[0],
        lambda cache: jaxkv.fork(cache, ints(0), ints(1)),
        jaxkv.compact,
    ):
        jax.jit(operation)(cache)
    chex.assert_trees_all_equal(jax.device_get(cache), before)


PAGES = 7919  # a size that nothing else has
WIDE = CacheConfig(
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    num_pages=PAGES,
    page_size=4,
    max_seqs=5,
    max_pages_per_seq=6,
    dtype="float32",
)
MAY_TOUCH_A_POOL = {"jit", "pjit", "while", "scan", "cond", "gather", "dynamic_slice", "closed_call"} | {
    f"scatter{suffix}" for suffix in ("", "-add", "-sub", "-min", "-max")
}


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("operation", ["allocate", "append", "free", "truncate", "fork"])
def test_cost_follows_the_batch_and_never_the_pool(operation):
    """No equation reads or makes an array as long as the pool, but to gather from it or scatter to it."""
    vector = ints(0, 1, 2)
    cache, batch = jitted.allocate(jaxkv.init(WIDE), vector, vector)
    k = jnp.zeros((3, 1, 1))
    arguments = {
        "allocate": (vector, vector),
        "append": (0, batch, k, k),
        "free": (vector,),
        "truncate": (vector, vector),
        "fork": (vector, vector),
    }[operation]
    jaxpr = jax.make_jaxpr(lambda cache: getattr(jaxkv, operation)(cache, *arguments))(cache)
    touching = {
        equation.primitive.name
        for equation in equations(jaxpr.jaxpr)
        for value in (*equation.invars, *equation.outvars)
        if PAGES in getattr(value.aval, "shape", ())
    }
    assert touching <= MAY_TOUCH_A_POOL | {"dynamic_update_slice"}


# Static mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: jaxkv.allocate(c, ints(0, 1), ints(1, 1), total_tokens=0), "total_tokens=0"),
        (lambda c: jaxkv.allocate(c, ints(0, 1), ints(1, 1), total_tokens=-3), "total_tokens=-3"),
        (lambda c: jaxkv.allocate(c, ints(), ints()), "seqs"),
        (lambda c: jaxkv.free(c, ints()), "seqs"),
    ],
)
def test_a_static_mistake_is_a_value_error_that_names_it(call, message):
    cache = jaxkv.init(SMALL)
    with pytest.raises(ValueError, match=message):
        call(cache)
    with pytest.raises(ValueError, match=message):
        jax.jit(call)(cache)


# With and without jit ---------------------------------------------------------------------------


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        ("pages_of_4", SMALL, [[0, 1], [2]]), ("pages_of_1", PAGE_OF_ONE, [[0, 1, 2, 3, 4], [5, 6]])
    )
    def test_allocate_free_and_truncate(self, config, pages):
        allocate = self.variant(partial(jaxkv.allocate, total_tokens=8))
        cache, batch = allocate(jaxkv.init(config), ints(3, -1, 1, 9), ints(5, 0, 2, 1))
        assert batch.status.tolist() == [OK, PADDING, OK, INVALID_SEQ]
        assert cache.table.lengths.tolist() == [0, 2, 0, 5]
        for slot, ids in zip((3, 1), pages, strict=True):
            assert cache.table.pages[slot, : len(ids)].tolist() == ids
        cache, _ = self.variant(jaxkv.truncate)(cache, ints(3), ints(1))
        assert cache.table.lengths.tolist() == [0, 2, 0, 1]
        cache = self.variant(jaxkv.free)(cache, ints(1, 3, 1))
        assert cache.table.num_free == config.num_pages
        jaxkv.check_invariants(cache)
