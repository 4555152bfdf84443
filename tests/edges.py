"""The corners of the state space: named ways to bring a twin to its limits, for every operation."""

from collections.abc import Callable

import pytest

from tests.caches import ONE_SEQUENCE, PAGE_OF_ONE, SMALL
from tests.twin import Twin


def nothing_used(twin):
    pass


def one_token(twin):
    twin.extend([0], [1])


def a_length_at_a_page_boundary(twin):
    twin.extend([0], [twin.config.page_size])


def a_length_one_past_a_page_boundary(twin):
    twin.extend([0], [twin.config.page_size + 1])


def a_full_row(twin):
    fill_row(twin, 0)


def nothing_free(twin):
    for slot in range(twin.config.max_seqs):
        fill_row(twin, slot)
    assert twin.oracle.num_free == 0


def one_page_free(twin):
    nothing_free(twin)
    slot = max(range(twin.config.max_seqs), key=lambda slot: twin.oracle.sequences[slot].length)
    length = twin.oracle.sequences[slot].length
    twin.truncate([slot], [(length - 1) // twin.config.page_size * twin.config.page_size])
    assert twin.oracle.num_free == 1


def the_largest_slot_in_use(twin):
    twin.extend([twin.config.max_seqs - 1], [2])


def a_shared_part_full_tail(twin):
    twin.extend([0], [twin.config.page_size + 1])
    last = twin.config.max_seqs - 1
    twin.fork([0, 0], [1, last])


def a_shared_tail_and_nothing_free(twin):
    a_shared_part_full_tail(twin)
    for slot in range(2, twin.config.max_seqs - 1):
        fill_row(twin, slot)


def holes_everywhere(twin):
    """Every other page free, in a jumbled order."""
    slots = range(twin.config.max_seqs)
    for _ in range(2):
        for slot in slots:
            twin.extend([slot], [min(twin.config.page_size, twin.total_tokens)])
    twin.truncate([slots[-1], 0], [twin.config.page_size, 0])
    twin.free([slots[len(slots) // 2]])


SITUATIONS = (
    nothing_used,
    one_token,
    a_length_at_a_page_boundary,
    a_length_one_past_a_page_boundary,
    a_full_row,
    nothing_free,
    one_page_free,
    the_largest_slot_in_use,
    a_shared_part_full_tail,
    a_shared_tail_and_nothing_free,
    holes_everywhere,
)

CONFIGS = {
    "pages of 4": SMALL,
    "pages of 1": PAGE_OF_ONE,
    "one sequence": ONE_SEQUENCE,
}


def fill_row(twin, slot):
    """As many tokens as the row and the pool hold."""
    config, sequence = twin.config, twin.oracle.sequences[slot]
    while True:
        owned = len(sequence.pages) * config.page_size
        room = min(config.max_tokens_per_seq, owned + twin.oracle.num_free * config.page_size)
        more = min(room - sequence.length, twin.total_tokens)
        if more <= 0:
            return
        twin.extend([slot], [more])


def at_every_edge(test: Callable) -> Callable:
    """Runs `test(twin)` from every situation, with every config."""
    test = pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__)(test)
    return pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)(test)


def brought_to(situation, config) -> Twin:
    twin = Twin(config)
    situation(twin)
    return twin
