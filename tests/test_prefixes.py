"""Prompts that begin alike share pages: exactly what was recorded is found, whatever became of it since."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Rope, Status
from jaxkv.memory import page_map
from jaxkv.memory.telemetry import Telemetry
from jaxkv.policies import HeavyHitter, SlidingWindow
from tests import jitted
from tests.caches import SMALL, ints
from tests.texts import MOST, TEXTS, WINDOWS_ONLY, Server

SMALLEST, LARGEST = -(2**31), 2**31 - 1
A, B, C, D, E = ([10 * n + i for i in range(4)] for n in range(1, 6))  # texts of a page


# What is found ------------------------------------------------------------------------------------


def test_a_prompt_shares_the_pages_that_an_earlier_one_left():
    server = Server()
    server.write(0, A + B + [7])
    pages = server.table.pages[0, :2].tolist()
    server.leave(0)
    assert (server.free_pages, server.reclaimable) == (6, 2)
    assert server.match(3, A + B + [8]) == 8
    assert server.table.pages[3, :2].tolist() == pages
    assert (server.free_pages, server.reclaimable) == (6, 0)


def test_a_prompt_shares_the_pages_that_another_sequence_uses():
    server = Server()
    server.write(0, A + B)
    server.record(0)
    assert server.match(1, A + B + C) == 8
    assert server.table.refcounts[server.table.pages[1, :2]].tolist() == [3, 3]
    server.write(1, C)
    server.check(0)
    server.check(1)


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token():
    server = Server()
    server.write(0, A + B)
    server.leave(0)
    assert server.match(0, A + B) == 4
    assert server.match(1, A + B + [1]) == 8
    assert server.match(2, A) == 0


def test_half_a_page_never_matches():
    server = Server()
    server.write(0, A + B[:2])
    server.leave(0)
    assert server.reclaimable == 1
    assert server.match(0, A + B) == 4
    assert server.match(1, [*A[:3], 1, 1, 1]) == 0


def test_the_longest_recorded_beginning_is_found():
    server = Server()
    for slot, text in enumerate((A + B, A + C + D)):
        server.write(slot, text)
        server.record(slot)
    assert server.match(2, A + C + E) == 8
    assert server.match(3, A + E + D) == 4


def test_different_salts_never_share():
    server = Server()
    server.write(0, A + B, salt=1)
    server.write(1, A + B, salt=SMALLEST)
    server.record(0, 1)
    assert server.match_as([2, 3], [A + B + [1]] * 2, [9, 9], [0, 2]) == [0, 0]
    assert server.match_as([2, 3], [A + B + [1]] * 2, [9, 9], [SMALLEST, 1]) == [8, 8]
    assert server.table.pages[2, :2].tolist() == server.table.pages[1, :2].tolist()


def test_without_a_salt_it_is_zero():
    server = Server()
    server.write(0, [*A, 1])
    seqs, rows, counts, _ = server.entries([0], [[*A, 1]], [5], [0])
    cache = jitted.record_prefix(server.cache, seqs, rows, counts)
    slots = ints(1, 2)
    both = np.stack([rows[0]] * 2), ints(5, 5)
    assert jitted.match_prefix(cache, slots, *both)[1].tolist() == [4, 4]
    assert jitted.match_prefix(cache, slots, *both, salt=ints(0, 1))[1].tolist() == [4, 0]


def test_recording_again_changes_nothing():
    server = Server()
    server.write(0, A + B)
    server.record(0)
    before = jax.device_get(server.cache)
    server.record(0)
    server.record_as([0, 0], [A + B] * 2, [8, 4], [0, 0])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(server.cache), before)


def test_recording_after_each_chunk_is_as_recording_once():
    server = Server()
    for part in (A[:3], A[3:] + B[:1], B[1:] + C[:2]):
        server.write(0, part)
        server.record(0)
    assert server.cache.stats.prefix_pages_recorded == 2
    assert server.match(1, A + B + C) == 8


def test_clear_prefixes_forgets_every_page_and_spares_sequences():
    server = Server()
    server.write(0, A + B)
    server.write(1, C)
    server.record(0, 1)
    server.free(1)
    assert server.reclaimable == 1
    server.cache = jitted.clear_prefixes(server.cache)
    jaxkv.check_invariants(server.cache)
    assert (server.reclaimable, server.free_pages) == (0, 6)
    assert server.match_as([1, 2], [A + B + [1], [*C, 1]], [9, 5], [0, 0]) == [0, 0]
    server.check(0)
    server.record(0)
    assert server.match(1, A + B + [1]) == 8


# Equal chains -------------------------------------------------------------------------------------


def test_of_two_sequences_that_record_one_chain_in_a_call_the_first_is_kept():
    server = Server()
    server.write(0, A + B)
    server.write(1, A + B)
    server.record_as([1, 0], [A + B] * 2, [8, 8], [0, 0])
    assert server.cache.stats.prefix_pages_recorded == 2
    kept = server.table.pages[1, :2].tolist()
    server.free(0, 1)
    assert (server.reclaimable, server.free_pages) == (2, 6)
    assert server.match(2, A + B + [1]) == 8
    assert server.table.pages[2, :2].tolist() == kept


def test_of_two_chains_recorded_in_a_call_the_second_continues_the_first():
    server = Server()
    server.write(0, A + B)
    server.write(1, A + C)
    server.record_as([0, 1], [A + B, A + C], [8, 8], [0, 0])
    of_first, of_second = server.table.pages[0, :2].tolist(), server.table.pages[1, :2].tolist()
    server.free(0, 1)
    assert server.match(2, A + C + [1]) == 8
    assert server.table.pages[2, :2].tolist() == [of_first[0], of_second[1]]


def test_a_second_recorder_continues_below_an_equal_page():
    server = Server()
    server.write(0, A + B)
    server.leave(0)
    server.write(0, A + B + C)
    server.leave(0)
    assert server.cache.stats.prefix_pages_recorded == 3
    assert server.match(1, A + B + C + [1]) == 12


def test_a_page_that_a_chain_lost_is_found_again_once_another_sequence_records_it():
    server = Server()
    server.write(0, A + B)
    server.record(0)
    server.truncate(0, 2)
    server.write(0, [9, 9])  # in place: the page leaves the index, B stays below a node without one
    assert server.match(1, A + B + [1]) == 0
    server.write(1, A)
    server.record(1)
    assert server.match(2, A + B + [1]) == 8
    server.check(0)


# What became of pages since -----------------------------------------------------------------------


def test_a_reclaimed_page_filled_with_other_tokens_is_no_parent_of_its_old_children():
    server = Server()
    server.write(0, A + B)
    page = server.table.pages[0, 0]
    server.record(0)
    server.truncate(0, 1)
    server.write(0, D[:3])
    assert server.table.pages[0, 0] == page
    other = A[:1] + D[:3]
    server.record(0)
    assert server.match(1, other + B + [1]) == 4
    assert server.match(2, A + B + [1]) == 0


def test_pages_are_reclaimed_from_the_end_of_what_was_left_first():
    server = Server()
    for slot, text in enumerate((A + B, C + D)):
        server.write(slot, text)
    server.leave(0)
    server.leave(1)
    server.write(2, E * 4)
    assert (server.free_pages, server.reclaimable) == (0, 4)
    for reclaimed, found in ((1, [4, 8]), (2, [0, 8]), (3, [0, 4]), (4, [0, 0])):
        assert server.write(3, E) == Status.OK
        assert server.cache.stats.prefix_pages_reclaimed == reclaimed
        asked = server.entries([0, 1], [A + B + [1], C + D + [1]], [9, 9], [0, 0])
        assert jitted.match_prefix(server.cache, *asked[:3], salt=asked[3])[1].tolist() == found
    assert server.write(0, [1]) == Status.OUT_OF_PAGES
    server.check(3)


def test_a_match_makes_pages_those_that_were_left_last():
    server = Server()
    for slot, text in enumerate((A, B)):
        server.write(slot, text)
        server.leave(slot)
    assert server.match(0, [*A, 1]) == 4
    server.free(0)
    server.write(1, E * 4)
    server.write(2, E * 3)
    assert server.match_as([3, 0], [[*A, 1], [*B, 1]], [5, 5], [0, 0]) == [4, 0]


def test_a_match_with_too_few_pages_for_the_rest_leaves_refcounts_as_they_were():
    server = Server()
    server.write(0, A + B)
    server.leave(0)
    server.write(1, C * 4)
    server.write(2, D * 2)
    before = server.table.refcounts.tolist()
    assert (server.free_pages, server.reclaimable) == (0, 2)
    assert server.match(3, A + B + E) == 8
    assert server.write(3, E) == Status.OUT_OF_PAGES
    server.check(3)
    server.free(3)
    assert server.table.refcounts.tolist() == before
    assert server.reclaimable == 2
    assert server.match(3, A + B + E) == 8


def test_a_record_after_truncate_is_of_what_is_left():
    server = Server()
    server.write(0, A + B + C)
    server.truncate(0, 6)
    server.record(0, num_tokens=12)
    assert server.match_as([1, 2], [A + B + [1], A + B[:2] + [1, 1, 1]], [9, 9], [0, 0]) == [4, 4]
    server.write(0, D[:2])
    server.record(0)
    assert server.match(3, A + B[:2] + D[:2] + [1]) == 8


def test_a_part_full_tail_that_the_index_alone_shares_is_written_in_place():
    server = Server()
    server.write(0, A + B)
    server.record(0)
    page = server.table.pages[0, 1]
    server.truncate(0, 6)
    assert server.match(1, A + B + [1]) == 8
    server.free(1)
    server.write(0, D[:2])
    assert server.table.pages[0, 1] == page
    assert server.cache.stats.copy_on_write_copies == 0
    assert server.match(1, A + B + [1]) == 4
    server.check(0)


def test_a_part_full_tail_that_another_sequence_shares_is_copied():
    server = Server()
    server.write(0, A + B)
    server.record(0)
    server.truncate(0, 6)
    assert server.match(1, A + B + [1]) == 8
    server.write(0, D[:2])
    assert server.cache.stats.copy_on_write_copies == 1
    server.check(0)
    server.check(1)
    server.record(0)
    server.free(0, 1)
    asked = [A + B + [1], A + B[:2] + D[:2] + [1]]
    assert server.match_as([0, 1], asked, [9, 9], [0, 0]) == [8, 8]


def test_a_record_after_a_fork_and_copy_on_write_is_of_each_ones_own_text():
    server = Server()
    server.write(0, A + B[:2])
    server.fork(0, 1)
    server.write(1, C[:2])
    server.write(0, D[:2])
    server.record(0, 1)
    server.free(0, 1)
    texts = [A + B[:2] + C[:2] + [1], A + B[:2] + D[:2] + [1]]
    assert server.match_as([2, 3], texts, [9, 9], [0, 0]) == [8, 8]


def test_a_text_kept_by_a_fork_outlives_its_parent():
    server = Server()
    server.write(0, A + B)
    server.record(0)
    server.fork(0, 1)
    server.free(0)
    assert server.reclaimable == 0
    server.free(1)
    assert server.reclaimable == 2
    assert server.match(2, A + B + [1]) == 8


def test_a_compaction_keeps_what_is_recorded():
    server = Server()
    for slot, text in enumerate((E, A + B, D)):
        server.write(slot, text)
    server.leave(1)
    server.free(0)
    server.cache, moved = jitted.compact(server.cache)
    jaxkv.check_invariants(server.cache)
    assert moved > 0
    assert server.match(0, A + B + [1]) == 8
    server.check(2)


# Tokens that were dropped, rewritten or shifted -----------------------------------------------------

ROPE = Rope.of(2, 10000.0)


def shift(server, slot, by):
    """All tokens but the first page's."""
    server.cache, status = jitted.shift_positions(server.cache, ints(slot), ints(by), rope=ROPE, first=4)
    assert status[0] == Status.OK


def test_shifted_tokens_are_not_recorded_and_leave_the_index():
    server = Server()
    server.write(0, A + B + C)
    server.record(0)
    shift(server, 0, 8)
    assert server.match(1, A + B + C + [1]) == 4
    server.free(1)
    server.record(0)
    assert server.match(1, A + B + C + [1]) == 4


def test_a_text_shared_with_one_that_shifts_is_found_as_it_was():
    server = Server()
    server.write(0, A + B)
    server.record(0)
    assert server.match(1, A + B + [1]) == 8
    shift(server, 1, 4)
    server.free(1)
    server.check(0)
    assert server.match(2, A + B + [1]) == 8


def test_a_cut_before_what_was_shifted_does_not_make_later_tokens_recordable():
    """They do not stand at the positions that a match would give them."""
    server = Server()
    server.write(0, A + B)
    shift(server, 0, 8)
    assert server.truncate(0, 12) == Status.OK
    assert server.cache.table.lengths[0] == 4 and server.cache.table.positions[0] == 12
    server.texts[0] = 0, A + C + D
    server.cache = jitted.allocate(server.cache, ints(0), ints(4), total_tokens=MOST)[0]
    server.record(0, num_tokens=16)
    assert server.cache.stats.prefix_pages_recorded == 1


def test_tokens_behind_a_shift_beyond_the_end_are_not_recorded():
    """The page was part full: what came in later stands further on than a match would have it."""
    server = Server()
    server.write(0, A[:2])
    shift(server, 0, 4)
    server.texts[0] = 0, A
    server.cache = jitted.allocate(server.cache, ints(0), ints(2), total_tokens=MOST)[0]
    assert server.table.positions[0] == 8
    server.record(0)
    assert server.cache.stats.prefix_pages_recorded == 0


def test_a_slot_that_was_emptied_is_intact_again():
    server = Server()
    server.write(0, A + B)
    shift(server, 0, 8)
    server.free(0)
    server.write(0, A + B)
    server.record(0)
    assert server.match(1, A + B + [1]) == 8


LAST_TOKEN = SlidingWindow(1, sinks=4)


def test_tokens_that_a_policy_dropped_are_never_recorded():
    """Also not where a cut leaves the first ones alone, and others come in behind."""
    server = Server(policy=LAST_TOKEN)
    text = [*range(100, 129)]
    for first in range(0, 29, 8):
        server.write(0, text[first : first + 8])
    assert server.cache.stats.evictions > 0
    server.record(0)
    assert server.cache.stats.prefix_pages_recorded == 1
    server.cache, _ = jitted.evict(server.cache, ints(0))
    assert server.truncate(0, 28) == Status.OK
    assert server.cache.table.lengths[0] == 4
    server.write(0, A)
    server.record(0)
    assert server.cache.stats.prefix_pages_recorded == 1
    assert server.match(1, text) == 4


def test_what_was_recorded_before_a_policy_dropped_it_is_found():
    server = Server(policy=LAST_TOKEN)
    text = [*range(100, 116)]
    for first in range(0, 16, 8):
        server.write(0, text[first : first + 8])
        server.record(0)
    server.write(0, A)
    assert server.cache.stats.evictions > 0
    assert server.match(1, [*text, 1]) == 16
    server.write(1, B)


def test_a_policy_that_goes_by_attention_is_refused():
    with pytest.raises(ValueError, match=r"HeavyHitter.*prefix_cache=True"):
        jaxkv.init(TEXTS, HeavyHitter(8, 4))


class Counting(SlidingWindow):
    """Remembers a number of each slot."""

    def first_values(self, config):
        return {"number": jnp.zeros((config.max_seqs,), jnp.int32)}


def test_what_a_policy_remembers_of_a_matched_slot_starts_anew():
    server = Server(policy=Counting(1, 4))
    server.write(0, A + B)
    state = server.cache.policy
    server.cache = replace(server.cache, policy=replace(state, values={"number": state.values["number"] + 7}))
    server.leave(0)
    assert server.match(0, A + B + C) == 8
    assert server.cache.policy.values["number"].tolist() == [0, 7, 7, 7]
    server.write(0, C)


# Windows ------------------------------------------------------------------------------------------

MIXED = replace(TEXTS, num_layers=2, num_pages=20, page_size=2, max_pages_per_seq=8, layer_windows=(3, None))


def test_a_windowed_page_that_a_row_released_stays_findable_if_it_was_recorded_in_time():
    server = Server(MIXED)
    for part in (A, B, C):
        server.write(0, part)
        server.record(0)
    server.free(0)
    assert server.match(1, [*A, 1]) == 4
    assert server.match(2, A + B + [1]) == 8
    lengths = server.table.lengths.reshape(2, 4)
    assert lengths[0, 2] == 8 and lengths[1, 2] == 2, "only what the next token sees"


def test_a_windowed_page_that_was_not_recorded_in_time_ends_a_match_where_the_next_token_sees_it():
    server = Server(MIXED)
    for part in (A, B, C):
        server.write(0, part)
    server.leave(0)
    found = [server.match(1, [*(A + B + C)[:length], 1]) for length in (4, 6)]
    assert found == [0, 0]
    assert server.match(1, A + B + [1]) == 8
    assert server.match(2, A + B + C + [1]) == 12


def test_a_windowed_parent_released_before_its_child_leaves_the_child_findable():
    server = Server(WINDOWS_ONLY)
    text = [1, 2, 3, 4, 5]
    for token in text:
        server.write(0, [token])
        server.record(0)
    assert server.reclaimable > 0
    for slot in (1, 2, 3):
        server.write(slot, [9, 9])  # these take what the window released, the first pages of the text
    assert server.reclaimable == 0
    server.free(2, 3)
    assert server.match(2, [*text, 6]) == 5
    assert server.match(3, [*text[:2], 6]) == 0
    server.free(0, 2)
    assert server.match(3, [*text, 6]) == 5


def test_running_out_of_nodes_costs_matches_only():
    """Nodes that stand for those below them alone are as many as a long text has tokens."""
    server = Server(WINDOWS_ONLY)
    random = np.random.default_rng(0)
    for _ in range(12):
        slot = int(random.integers(0, 3))
        server.free(slot)
        text = random.integers(0, 2, 9).tolist()
        matched = server.match(slot, text)
        for token in text[matched:]:
            if server.write(slot, [token]) == Status.OK:
                server.record(slot)
        server.check(slot)
    nodes = len(server.table.prefixes.parents)
    assert server.cache.stats.prefix_tokens_matched > 0
    assert int(server.table.prefixes.num_free_nodes) < nodes
    bare = np.all(server.table.prefixes.pages == server.config.num_pages, axis=1)
    assert bare.sum() > server.table.prefixes.num_free_nodes, "no node stood for those below it alone"


# Hashes decide nothing but speed --------------------------------------------------------------------


def random_texts(server, rounds, seed=0) -> int:
    """Texts of few tokens come and go; returns the tokens matched."""
    random = np.random.default_rng(seed)
    for _ in range(rounds):
        slot, salt = int(random.integers(0, 4)), int(random.integers(0, 2))
        server.free(slot)
        text = np.repeat(random.integers(0, 2, 4), 4)[: random.integers(5, 16)].tolist()
        matched = server.match(slot, text, salt)
        if server.write(slot, text[matched:], salt) == Status.OK:
            server.check(slot)
            server.record(slot)
    return int(server.cache.stats.prefix_tokens_matched)


def test_texts_that_come_and_go_hold_what_they_should():
    server = Server()
    assert random_texts(server, 60) > 100
    assert server.cache.stats.prefix_pages_reclaimed > 0


def with_hashes(monkeypatch, change):
    """`change` makes other hashes of the proper ones, of buckets and of tags."""
    from jaxkv import prefix_index

    proper = prefix_index.hash_prefixes
    monkeypatch.setattr(prefix_index, "hash_prefixes", lambda *of: change(*proper(*of)))


@pytest.mark.parametrize("hashes", ["all equal", pytest.param("of equal tags", marks=pytest.mark.slow)])
def test_whatever_the_hash_matches_are_right(hashes, monkeypatch, traced_anew):
    with_hashes(
        monkeypatch,
        lambda which, tags: (which * 0 if hashes == "all equal" else which, jnp.zeros_like(tags)),
    )
    server = Server()
    assert random_texts(server, 30) > 0
    server.free(*range(4))
    server.cache = jaxkv.clear_prefixes(server.cache)
    texts = [[n] * 4 for n in range(8)]
    for text in texts:
        server.write(0, text)
        server.leave(0)
    found = [server.match(1, [*text, 1]) for text in texts if server.free(1) is None]
    assert found[0] == 4 and set(found) <= {0, 4}


def test_a_full_bucket_costs_matches_until_one_of_its_nodes_goes(monkeypatch, traced_anew):
    with_hashes(monkeypatch, lambda which, tags: (jnp.zeros_like(which), tags))
    server = Server(replace(TEXTS, num_pages=11))

    def found():
        return [server.match(1, [*text, 1]) for text in texts if server.free(1) is None]

    texts = [[n] * 4 for n in range(10)]
    for text in texts[:9]:
        server.write(0, text)
        server.leave(0)
    assert found() == [4] * 8 + [0] * 2
    assert (server.free_pages, server.reclaimable) == (3, 8)
    server.write(2, E * 4)  # three free pages, and the one that was left first
    server.write(0, texts[9])  # the next
    server.leave(0)
    assert found() == [0] * 2 + [4] * 6 + [0, 4]
    assert random_texts(server, 20) > 0


# Edges --------------------------------------------------------------------------------------------


def test_with_nothing_free_a_match_succeeds():
    server = Server()
    server.write(0, A + B)
    server.leave(0)
    server.write(1, C * 4)
    server.write(2, D * 2)
    assert (server.free_pages, server.reclaimable) == (0, 2)
    assert server.match_as([0, 3], [A + B + [1]] * 2, [9, 9], [0, 0]) == [8, 8]
    assert (server.free_pages, server.reclaimable) == (0, 0)
    assert server.write(0, [1]) == Status.OUT_OF_PAGES


def test_with_one_page_free_the_rest_of_a_match_takes_it():
    server = Server()
    server.write(0, A + B)
    server.leave(0)
    server.write(1, C * 4)
    server.write(2, D)
    assert (server.free_pages, server.reclaimable) == (1, 2)
    assert server.match(3, A + B + E) == 8
    assert server.write(3, E) == Status.OK
    server.check(3)


@pytest.mark.parametrize(
    "config",
    [
        replace(TEXTS, page_size=1, max_seqs=1, num_pages=5, max_pages_per_seq=5),
        pytest.param(replace(TEXTS, num_pages=1, max_pages_per_seq=1, max_seqs=2), marks=pytest.mark.slow),
    ],
    ids=["pages of one, one sequence", "one page"],
)
def test_the_smallest_caches_match_and_reclaim(config):
    server, last, size = Server(config), config.max_seqs - 1, config.page_size
    room = config.max_tokens_per_seq
    text = [*range(50, 50 + room)]
    server.write(last, text)
    server.leave(last)
    assert server.reclaimable == config.num_pages
    assert server.match(last, [*text, 1]) == room
    assert server.write(last, [1]) == Status.SEQUENCE_TOO_LONG
    server.free(last)
    assert server.match(last, text) == room - size
    server.write(last, text[room - size :])
    server.free(last)
    other = [*range(70, 70 + room)]
    server.write(last, other)
    server.check(last)
    server.leave(last)
    assert server.match(last, [*text, 1]) == 0
    assert server.match(last, [*other, 1]) == room


def test_a_row_that_is_matched_full_takes_no_more():
    server = Server()
    server.write(0, A + B + C + D)
    server.leave(0)
    assert server.match(3, A + B + C + D + [1]) == 16
    assert server.write(3, [1]) == Status.SEQUENCE_TOO_LONG


@pytest.fixture(scope="module")
def recorded():
    """Slot 0 is in use, [A B] are recorded; slot 1 has another text."""
    server = Server()
    server.write(0, A + B)
    server.record(0)
    server.write(1, E)
    return server.cache


UNCHANGED = {
    # what: slots, counts
    "padding": ((-1, SMALLEST), (9, 9)),
    "slots that there are not": ((4, LARGEST), (9, 9)),
    "occupied slots": ((0, 1), (9, 9)),
    "a slot named twice": ((2, 2), (9, 9)),
    "a slot named twice, once for nothing": ((2, 2), (9, 0)),
    "no tokens": ((2, 3), (0, 1)),
    "a negative number": ((2, 3), (-1, SMALLEST)),
    "less than a page and a token": ((2, 3), (4, 3)),
}


@pytest.mark.parametrize("what", UNCHANGED)
def test_entries_that_match_nothing_change_nothing(what, recorded):
    slots, counts = UNCHANGED[what]
    rows = np.array([A + B + [1]] * 2, np.int32)
    cache, matched = jitted.match_prefix(recorded, ints(*slots), rows, ints(*counts))
    assert matched.tolist() == [0, 0]
    for got, want in zip(*map(jax.tree.leaves, (cache.table, recorded.table)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_largest_slot_and_a_count_beyond_the_row_match_what_there_is(recorded):
    rows = np.array([A + B + [1]] * 2, np.int32)
    cache, matched = jitted.match_prefix(recorded, ints(3, 2), rows, ints(LARGEST, 10))
    assert matched.tolist() == [8, 8]
    assert cache.stats.prefix_tokens_asked == 18
    jaxkv.check_invariants(cache)


def test_tokens_narrower_than_a_page_match_and_record_nothing(recorded):
    rows = np.array([A[:3]] * 2, np.int32)
    cache, matched = jitted.match_prefix(recorded, ints(2, -1), rows, ints(3, 3))
    assert matched.tolist() == [0, 0]
    assert cache.stats.prefix_queries == 1 and cache.stats.prefix_tokens_asked == 3
    cache = jitted.record_prefix(recorded, ints(1, 0), rows, ints(3, 3))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(cache), jax.device_get(recorded))


@pytest.mark.parametrize("slots", [(-1, 4), (2, 3), (SMALLEST, LARGEST)])
@pytest.mark.parametrize("count", [9, LARGEST])
def test_nothing_is_recorded_of_padding_and_empty_slots(slots, count, recorded):
    rows = np.array([A + B + [1]] * 2, np.int32)
    cache = jitted.record_prefix(recorded, ints(*slots), rows, ints(count, count))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(cache), jax.device_get(recorded))


@pytest.mark.parametrize(("count", "pages"), [(SMALLEST, 0), (-1, 0), (3, 0), (4, 1), (LARGEST, 1)])
def test_no_more_is_recorded_than_a_sequence_holds(count, pages, recorded):
    rows = np.array([E + A + [1]] * 2, np.int32)
    cache = jitted.record_prefix(recorded, ints(1, -1), rows, ints(count, count))
    assert cache.stats.prefix_pages_recorded - recorded.stats.prefix_pages_recorded == pages
    jaxkv.check_invariants(cache)


def test_a_stale_batch_after_a_match_writes_nothing(recorded):
    cache, batch = jitted.allocate(recorded, ints(1), ints(1), total_tokens=MOST)
    rows = np.array([A + B + [1]] * 2, np.int32)
    cache, matched = jitted.match_prefix(cache, ints(2, -1), rows, ints(9, 9))
    assert matched[0] == 8
    k = jnp.full((MOST, 1, 2), 5.0)
    written = jitted.append(cache, 0, batch, k, k)
    jax.tree.map(np.testing.assert_array_equal, written.pool, cache.pool)
    assert np.isnan(jitted.attend(cache, 0, batch, k)).all()


def test_a_batch_lives_on_where_nothing_matched(recorded):
    cache, batch = jitted.allocate(recorded, ints(1), ints(1), total_tokens=MOST)
    rows = np.array([C + D + [1]] * 2, np.int32)
    cache, _ = jitted.match_prefix(cache, ints(2, -1), rows, ints(9, 9))
    k = jnp.full((MOST, 1, 2), 5.0)
    assert np.isfinite(jitted.attend(jitted.append(cache, 0, batch, k, k), 0, batch, k)).all()


# Refused when traced --------------------------------------------------------------------------------

GOOD = dict(seqs=ints(1), tokens=np.array([[*A, 1]], np.int32), num_tokens=ints(5), salt=ints(0))
WRONG = {
    "tokens of one axis": (dict(tokens=GOOD["tokens"][0]), r"tokens.*\[1, max_tokens\].*int32\[5\]"),
    "tokens for two entries": (dict(tokens=np.zeros((2, 5), np.int32)), r"tokens.*\[1, max_tokens\]"),
    "tokens of no width": (dict(tokens=np.zeros((1, 0), np.int32)), "tokens.*a row for each"),
    "floats for tokens": (dict(tokens=np.zeros((1, 5), np.float32)), "tokens.*float32"),
    "more counts than slots": (dict(num_tokens=ints(5, 5)), "seqs and num_tokens.*1 and 2"),
    "more salts than slots": (dict(salt=ints(0, 0)), "salt.*1 and 2"),
    "a float for a salt": (dict(salt=np.zeros(1, np.float32)), "salt.*float32"),
    "a scalar slot": (dict(seqs=np.int32(1)), "seqs must be a non-empty int32 vector"),
    "no slots": (dict(seqs=np.zeros(0, np.int32)), "seqs must be a non-empty"),
}


@pytest.mark.parametrize("function", [jaxkv.match_prefix, jaxkv.record_prefix], ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_shapes_and_dtypes_are_refused(what, function, recorded):
    changes, message = WRONG[what]
    given = GOOD | changes
    salt = given.pop("salt")
    with pytest.raises(ValueError, match=message):
        function(recorded, *given.values(), salt=salt)


def test_a_cache_without_an_index_is_refused():
    cache, given = jitted.init(replace(TEXTS, prefix_cache=False)), tuple(GOOD.values())[:3]
    for function in (jaxkv.match_prefix, jaxkv.record_prefix):
        with pytest.raises(ValueError, match=rf"{function.__name__} needs .*prefix_cache=True"):
            function(cache, *given)
    with pytest.raises(ValueError, match=r"clear_prefixes needs .*prefix_cache=True"):
        jaxkv.clear_prefixes(cache)


@pytest.mark.parametrize("value", [1, None, "yes", np.int32(1)])
def test_prefix_cache_is_a_boolean(value):
    with pytest.raises(ValueError, match="prefix_cache="):
        replace(SMALL, prefix_cache=value)


# What is said of it ---------------------------------------------------------------------------------


def test_statistics_count_queries_tokens_and_pages():
    server = Server()
    server.write(0, A + B + [1])
    server.leave(0)
    server.match_as([0, 1], [A + B + [1], C], [9, 4], [0, 0])
    server.match_as([0, -1], [A, A], [4, 4], [0, 0])  # neither asks: one is in use, one is padding
    server.free(0)
    server.write(1, C * 4)
    server.write(2, D * 3)
    stats = server.cache.stats.as_dict()
    assert {name: stats[name] for name in stats if name.startswith("prefix")} == dict(
        prefix_queries=2,
        prefix_tokens_asked=13,
        prefix_tokens_matched=8,
        prefix_pages_recorded=2,
        prefix_pages_reclaimed=1,
    )
    assert stats["current_pages"] == 7
    assert stats["total_allocations"] == 3 + 2 + 7
    assert stats["total_deallocations"] == 3 + 2


@pytest.fixture(scope="module")
def with_reclaimable():
    """Pages 0 and 4 are in use, 1 and 2 reclaimable, 3 is free below page 4."""
    server = Server()
    for slot, text in enumerate((D, A + B, [1], E)):
        server.write(slot, text)
    server.leave(1)
    server.free(2)
    return server.cache


def test_reclaimable_pages_are_neither_used_nor_free_in_a_profile(with_reclaimable):
    profile = jaxkv.memory_profile(with_reclaimable)
    assert (profile.physical_pages, profile.reclaimable_pages, profile.free_pages) == (2, 2, 4)
    assert profile.used_bytes + profile.reclaimable_bytes + profile.free_bytes == profile.pool_bytes
    assert profile.reclaimable_bytes == 2 * TEXTS.page_bytes
    assert profile.usage == 2 / 8
    assert profile.holes == 1
    assert profile.as_dict()["reclaimable_pages"] == 2
    assert profile.as_dict()["prefix_pages_recorded"] == 2


def test_a_map_of_pages_shows_reclaimable_ones(with_reclaimable):
    cells = page_map(with_reclaimable)
    assert cells.used.tolist() == [True, False, False, False, True, False, False, False]
    assert cells.reclaimable.tolist() == [False, True, True] + [False] * 5
    assert cells.holes.tolist() == [False] * 3 + [True] + [False] * 4
    assert cells.text(width=80).splitlines() == [
        "0 █░░·█···",
        "· free   ▁ to █ fuller   ▓ shared   ░ reclaimable   each a page",
    ]
    assert cells.text(width=80, ascii_only=True).startswith("0 #~~.#...")
    by_two = cells.grouped(2)
    assert by_two.reclaimable.tolist() == [False, True, False, False]


def test_a_report_names_reclaimable_pages(with_reclaimable):
    report = jaxkv.memory_profile(with_reclaimable).report()
    assert re.search(r"^  used +2 pages", report, re.MULTILINE)
    assert re.search(r"^  reclaimable +2 pages", report, re.MULTILINE)
    assert re.search(r"^  free +4 pages", report, re.MULTILINE)
    assert re.search(r"^prefix pages recorded +2 ", report, re.MULTILINE)
    assert "reclaimable" not in jaxkv.memory_profile(jitted.init(replace(TEXTS, prefix_cache=False))).report()


def test_telemetry_publishes_reclaimable_pages_and_matches():
    telemetry, server = Telemetry(), Server()
    server.write(0, A + B)
    server.leave(0)
    server.match(1, [*A, 1])
    telemetry.observe(server.cache)
    telemetry.flush()
    seen = {sample.name: sample.value for metric in telemetry.registry.collect() for sample in metric.samples}
    want = {
        "jaxkv_pages_reclaimable": 1,
        "jaxkv_pages_used": 1,
        "jaxkv_pages_free": 6,
        "jaxkv_prefix_queries_total": 1,
        "jaxkv_prefix_tokens_asked_total": 5,
        "jaxkv_prefix_tokens_matched_total": 4,
        "jaxkv_prefix_pages_recorded_total": 2,
        "jaxkv_prefix_pages_reclaimed_total": 0,
    }
    assert {name: seen[name] for name in want} == want


def test_the_bytes_of_the_index_are_in_every_estimate():
    cache = jitted.init(TEXTS)
    assert TEXTS.estimated_memory_bytes() == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    without = replace(TEXTS, prefix_cache=False)
    index = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.table.prefixes))
    assert TEXTS.estimated_memory_bytes() - without.estimated_memory_bytes() == index
