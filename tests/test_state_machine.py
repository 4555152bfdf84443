"""Any history of operations leaves the cache as the oracle says, in every byte that can be read.

`JAXKV_EXAMPLES` sets how many histories of 40 steps are tried, over all shapes together.
"""

import os
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, rule

from jaxkv import CacheConfig
from tests.twin import Twin

LARGEST = 2**31 - 1

BASE = CacheConfig(
    num_layers=2, num_kv_heads=2, head_dim=4, num_pages=14, page_size=4, max_seqs=6, dtype="float32"
)
SHAPES = {
    "grouped heads, short rows": {
        "config": replace(BASE, num_pages=10, max_pages_per_seq=4),
        "q_heads": 4,
        "total_tokens": 10,
    },
    "pages of one token": {
        "config": replace(BASE, page_size=1, num_pages=24, max_pages_per_seq=9, num_kv_heads=1),
        "q_heads": 3,
        "total_tokens": 12,
    },
    "few entries, long rows, bfloat16": {
        "config": replace(BASE, page_size=3, num_pages=16, max_pages_per_seq=16, dtype="bfloat16"),
        "q_heads": 2,
        "entries": 3,
        "total_tokens": 20,
    },
    "one sequence, few pages, float16": {
        "config": replace(BASE, max_seqs=1, page_size=2, num_pages=3, max_pages_per_seq=3, dtype="float16"),
        "q_heads": 2,
        "total_tokens": 8,
    },
    "more slots than pages": {
        "config": replace(BASE, num_layers=1, max_seqs=9, num_pages=5, page_size=8, max_pages_per_seq=2),
        "q_heads": 2,
        "total_tokens": 20,
    },
    "int8, rows as wide as the pool": {
        "config": replace(BASE, head_dim=8, num_pages=9, max_pages_per_seq=9, quantization="int8"),
        "q_heads": 4,
        "total_tokens": 14,
    },
    "fp8, odd pages": {
        "config": replace(
            BASE, head_dim=5, page_size=3, num_pages=12, max_pages_per_seq=5, quantization="fp8"
        ),
        "q_heads": 2,
        "total_tokens": 12,
    },
    "int4, pages of two": {
        "config": replace(
            BASE, head_dim=24, page_size=2, num_pages=12, max_pages_per_seq=6, quantization="int4"
        ),
        "q_heads": 4,
        "total_tokens": 10,
    },
}
GROUPED = {
    "one full layer among windows": {
        "config": replace(
            BASE, num_layers=3, num_pages=20, max_pages_per_seq=6, layer_windows=(5, None, 5), max_chunk=9
        ),
        "q_heads": 2,
        "total_tokens": 12,
    },
    "windows of one and three, pages of one": {
        "config": replace(
            BASE,
            num_layers=3,
            page_size=1,
            num_pages=30,
            max_pages_per_seq=9,
            layer_windows=(None, 1, 3),
            max_chunk=6,
        ),
        "q_heads": 2,
        "total_tokens": 8,
    },
    "windows only": {
        "config": replace(BASE, num_pages=8, max_pages_per_seq=9, layer_windows=(6, 6), max_chunk=7),
        "q_heads": 2,
        "total_tokens": 9,
    },
    "windows below and of a page, rollback": {
        "config": replace(
            BASE,
            num_layers=3,
            num_pages=18,
            max_pages_per_seq=5,
            layer_windows=(2, None, 4),
            rollback=4,
            max_chunk=8,
        ),
        "q_heads": 2,
        "total_tokens": 10,
    },
    "a window beyond the context, groups of one layer": {
        "config": replace(
            BASE,
            num_layers=4,
            num_pages=16,
            max_pages_per_seq=4,
            layer_windows=(99, None, 99, None),
            group_layers=1,
        ),
        "q_heads": 2,
        "total_tokens": 10,
    },
    "kinds of three shapes, int8": {
        "config": replace(
            BASE,
            num_layers=3,
            page_size=4,
            num_pages=24,
            max_pages_per_seq=4,
            quantization="int8",
            max_chunk=8,
            layer_windows=(3, None, 5),
            layer_kv_heads=(2, 1, 4),
            layer_head_dims=(8, 16, 4),
            rollback=1,
        ),
        "q_heads": 4,
        "total_tokens": 10,
    },
    "kinds of two shapes, int4": {
        "config": replace(
            BASE,
            num_layers=3,
            page_size=4,
            num_pages=20,
            max_pages_per_seq=4,
            quantization="int4",
            max_chunk=8,
            layer_windows=(3, None, 3),
            layer_kv_heads=(2, 1, 2),
            layer_head_dims=(8, 32, 8),
        ),
        "q_heads": 2,
        "total_tokens": 10,
    },
}
SHAPES |= GROUPED
EXAMPLES = int(os.environ.get("JAXKV_EXAMPLES", "300"))


class Machine(RuleBasedStateMachine):
    shape: dict

    def __init__(self):
        super().__init__()
        self.twin = self.begin()
        twin, config = self.twin, self.twin.config
        slots = st.integers(0, config.max_seqs - 1)
        odd_slots = st.sampled_from([-1, -7, config.max_seqs, config.max_seqs + 3, LARGEST])
        self.slot = slot = st.one_of(slots, slots, slots, odd_slots)
        odd_counts = st.sampled_from([0, -1, LARGEST, twin.total_tokens, config.page_size])
        count = st.one_of(st.integers(1, 3), st.integers(1, twin.total_tokens), odd_counts)
        odd_lengths = st.sampled_from([0, -1, LARGEST, config.page_size])
        length = st.one_of(st.integers(0, config.max_tokens_per_seq), odd_lengths)
        self.slots = entries(twin, slot)
        self.requests = entries(twin, st.tuples(slot, count))
        self.decode = st.permutations(range(config.max_seqs))
        self.forks = entries(twin, st.tuples(slot, slot))
        self.cuts = entries(twin, st.tuples(slot, length))
        self.near_cuts = entries(twin, st.tuples(slots, st.integers(1, config.page_size + 1)))

    def begin(self) -> Twin:
        return Twin(**self.shape)

    @rule(data=st.data())
    def extend(self, data):
        self.twin.extend(*columns(data.draw(self.requests)))

    @rule(data=st.data())
    def decode_all(self, data):
        """One token for as many distinct sequences as a call takes."""
        seqs = data.draw(self.decode)[: self.twin.entries]
        self.twin.extend(seqs, [1] * len(seqs))

    @rule(data=st.data(), over=st.integers(0, 1))
    def fill_a_row(self, data, over):
        """Up to the last place of a row, or one past it."""
        slot = data.draw(st.integers(0, self.twin.config.max_seqs - 1))
        room = self.twin.config.max_tokens_per_seq - self.twin.oracle.stored(slot)
        self.twin.extend([slot], [min(room + over, self.twin.total_tokens)])

    @rule(data=st.data())
    def fork(self, data):
        self.twin.fork(*columns(data.draw(self.forks)))

    @rule(data=st.data())
    def fork_live_into_empty(self, data):
        """Forks that mostly succeed; a child may be named twice."""
        live, empty = self.slots_by(lambda length: length > 0), self.slots_by(lambda length: length == 0)
        if live and empty:
            pair = st.tuples(st.sampled_from(live), st.sampled_from(empty))
            self.twin.fork(*columns(data.draw(entries(self.twin, pair))))

    @rule(data=st.data())
    def reorder(self, data):
        self.twin.reorder(*columns(data.draw(self.forks)))

    @rule(data=st.data())
    def reorder_live_ones(self, data):
        """As beam search does: every slot named once, parents in use."""
        live = self.slots_by(lambda length: length > 0)
        if live:
            seqs = data.draw(self.decode)[: self.twin.entries]
            parents = st.lists(st.sampled_from(live), min_size=len(seqs), max_size=len(seqs))
            self.twin.reorder(seqs, data.draw(parents))

    @rule(data=st.data(), tokens=st.integers(1, 2))
    def write_to_shared_tails(self, data, tokens):
        """Where the first write copies the page, several owners at once."""
        owners = self.twin.oracle.owners()
        shared = [
            slot
            for slot, sequence in enumerate(self.twin.oracle.sequences)
            for of, row in zip(self.twin.config.groups, sequence.rows, strict=True)
            if row.length % of.page_size and owners[row.pages[-1]] > 1
        ]
        shared = list(dict.fromkeys(shared))
        if shared:
            seqs = data.draw(st.permutations(shared))[: self.twin.entries]
            self.twin.extend(seqs, [tokens] * len(seqs))

    @rule(data=st.data(), tokens=st.integers(1, 5))
    def drop_by_policy(self, data, tokens):
        """A policy that dropped tokens leaves a position ahead of its length."""
        live = self.slots_by(lambda length: length > 0)
        # A window counts by positions: of sequences with one, policies move no positions.
        if live and not self.twin.oracle.windowed:
            self.twin.advance_position(data.draw(st.sampled_from(live)), tokens)

    @rule(data=st.data())
    def free(self, data):
        self.twin.free(data.draw(self.slots))

    @rule(data=st.data())
    def truncate(self, data):
        self.twin.truncate(*columns(data.draw(self.cuts)))

    @rule(data=st.data())
    def roll_back_a_little(self, data):
        cuts = data.draw(self.near_cuts)
        lengths = [s.position for s in self.twin.oracle.sequences]
        self.twin.truncate([slot for slot, _ in cuts], [lengths[slot] - by for slot, by in cuts])

    @rule()
    def compact(self):
        self.twin.compact()
        assert self.twin.compact() == 0, "the second time there is nothing to move"

    def slots_by(self, condition):
        sequences = enumerate(self.twin.oracle.sequences)
        return [slot for slot, sequence in sequences if condition(sequence.position)]


def entries(twin, entry):
    return st.lists(entry, min_size=1, max_size=twin.entries)


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def machine(name, shape, kind=Machine, examples=None, **options):
    examples = examples or -(-EXAMPLES // (len(SHAPES) - len(SLOW)))
    case = type("Machine", (kind,), {"shape": shape}).TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    case.__name__ = case.__qualname__ = "Test" + "".join(c for c in name.title() if c.isalnum())
    return case


# Of layer groups every run has a full layer among windows, pages of one token, and kinds of three shapes; of
# formats float32, float16, int8 and int4.
SLOW = {
    "few entries, long rows, bfloat16",
    "more slots than pages",
    "fp8, odd pages",
    "windows only",
    "windows below and of a page, rollback",
    "a window beyond the context, groups of one layer",
    "kinds of two shapes, int4",
}
CASES = {name: machine(name, shape) for name, shape in SHAPES.items()}
globals().update(
    {case.__name__: pytest.mark.slow(case) if name in SLOW else case for name, case in CASES.items()}
)
