"""As `test_state_machine`, with prompts that are recorded and found again."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import rule

from tests.test_state_machine import BASE, Machine, columns, entries, machine

SHAPES = {
    "prefixes": {
        "config": replace(BASE, num_pages=12, max_pages_per_seq=4),
        "q_heads": 2,
        "total_tokens": 10,
    },
    "prefixes, pages of one": {
        "config": replace(BASE, num_layers=1, page_size=1, num_pages=16, max_pages_per_seq=7),
        "q_heads": 2,
        "total_tokens": 12,
    },
    "prefixes, one full layer among windows": {
        "config": replace(
            BASE,
            num_layers=3,
            page_size=2,
            num_pages=24,
            max_pages_per_seq=6,
            layer_windows=(5, None, 5),
            max_chunk=9,
            rollback=1,
        ),
        "q_heads": 2,
        "total_tokens": 10,
    },
    "prefixes, windows only": {
        "config": replace(
            BASE, page_size=1, num_pages=7, max_pages_per_seq=9, layer_windows=(3, 3), max_chunk=5
        ),
        "q_heads": 2,
        "total_tokens": 7,
    },
    "prefixes, pages of several sizes, int8": {
        "config": replace(
            BASE,
            num_layers=3,
            page_size=2,
            num_pages=22,
            max_pages_per_seq=5,
            quantization="int8",
            max_chunk=8,
            layer_windows=(3, None, 5),
            layer_kv_heads=(2, 2, 1),
            layer_head_dims=(8, 8, 8),
        ),
        "q_heads": 4,
        "total_tokens": 10,
    },
    "prefixes, one sequence": {
        "config": replace(BASE, max_seqs=1, page_size=2, num_pages=3, max_pages_per_seq=3),
        "q_heads": 2,
        "total_tokens": 8,
    },
}


class PrefixMachine(Machine):
    def __init__(self):
        super().__init__()
        salts = st.sampled_from([0, 0, 0, 1])
        self.records = entries(self.twin, st.tuples(self.slot, st.integers(-1, 40), salts))
        self.queries = entries(
            self.twin, st.tuples(self.slot, st.integers(0, 10**6), st.integers(-1, 3), salts)
        )

    @rule(data=st.data())
    def record(self, data):
        slots, counts, salts = columns(data.draw(self.records))
        self.twin.record_prefix(slots, [self.ids(slot) for slot in slots], counts, salts)

    @rule(salt=st.sampled_from([0, 0, 0, 1]))
    def record_all(self, salt):
        """Whole sequences, as many as a call takes."""
        live = self.slots_by(lambda position: position > 0)[: self.twin.entries]
        ids = [self.ids(slot) for slot in live]
        if live:
            self.twin.record_prefix(live, ids, list(map(len, ids)), [salt] * len(live))

    @rule(data=st.data())
    def match(self, data):
        self.ask(data.draw(self.queries))

    @rule(data=st.data())
    def match_empty_slots(self, data):
        empty = self.slots_by(lambda position: position == 0)
        if empty:
            query = st.tuples(st.sampled_from(empty), st.integers(0, 10**6), st.integers(0, 3), st.just(0))
            self.ask(data.draw(entries(self.twin, query)))

    @rule(data=st.data(), choice=st.integers(0, 10**6), kept=st.integers(0, 99))
    def serve(self, data, choice, kept):
        """As a server takes a request: some of a known text and more, of which the rest is computed."""
        empty = self.slots_by(lambda position: position == 0)
        slot = data.draw(st.sampled_from(empty or range(self.twin.config.max_seqs)))
        self.twin.free([slot])
        known = sorted(self.twin.oracle.prefixes.known()) or [(0, ())]
        salt, text = known[choice % len(known)]
        text = [*text[: len(text) * min(kept, 50) // 50], *data.draw(st.lists(st.integers(0, 1), max_size=6))]
        (matched,) = self.twin.match_prefix([slot], [text], [len(text)], [salt])
        rest = text[matched : matched + self.twin.total_tokens]
        self.twin.extend([slot], [len(rest)], [*rest, *[0] * (self.twin.total_tokens - len(rest))])
        self.twin.record_prefix([slot], [self.ids(slot)], [len(text)], [salt])

    @rule(data=st.data())
    def free_recorded(self, data):
        """What a server does with a request that is done."""
        live = self.slots_by(lambda position: position > 0)
        if live:
            slots = data.draw(st.lists(st.sampled_from(live), min_size=1, max_size=self.twin.entries))
            ids = [self.ids(slot) for slot in slots]
            self.twin.record_prefix(slots, ids, list(map(len, ids)), [0] * len(slots))
            self.twin.free(slots)

    @rule(data=st.data(), percent=st.integers(0, 99))
    def clear(self, data, percent):
        if percent < 10:
            self.twin.clear_prefixes()

    def ask(self, queries):
        """Known beginnings, cut or continued a little."""
        slots, choices, more, salts = columns(queries)
        known = sorted(self.twin.oracle.prefixes.known()) or [(0, (0, 1))]
        rows = [[*known[choice % len(known)][1], *(0, 1, 1)] for choice in choices]
        counts = [len(row) - 3 + some for row, some in zip(rows, more, strict=True)]
        self.twin.match_prefix(slots, rows, counts, salts)

    def ids(self, slot):
        in_range = 0 <= slot < self.twin.config.max_seqs
        return self.twin.oracle.sequences[slot].ids if in_range else [0]


def with_prefixes(shape):
    return shape | {"config": replace(shape["config"], prefix_cache=True)}


# Every run has a full layer among windows.
FAST = {"prefixes, one full layer among windows"}
CASES = {name: machine(name, with_prefixes(shape), PrefixMachine) for name, shape in SHAPES.items()}
globals().update(
    {case.__name__: case if name in FAST else pytest.mark.slow(case) for name, case in CASES.items()}
)
