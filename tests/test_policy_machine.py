"""The same for a cache under each policy: what stays is what the policy's rule in plain NumPy says."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import precondition, rule

from jaxkv import Rope
from jaxkv.policies import HeavyHitter, LeastRecentlyUsed, PromptCompress, SemanticMerge, SlidingWindow
from tests.policy_twin import PolicyTwin
from tests.test_state_machine import BASE, EXAMPLES, Machine, columns, entries, machine

HALF, INTERLEAVED = Rope.of(4, 10000.0), Rope((1.0, 0.3), "interleaved")
CONFIG = replace(BASE, max_seqs=4, max_pages_per_seq=5)
SHAPES = {
    "window with sinks": {"policy": SlidingWindow(6, 2), "config": CONFIG},
    "window that moves up": {
        "policy": SlidingWindow(5, 3, positions="cache", rope=HALF),
        "config": replace(CONFIG, num_pages=9),
    },
    "window of one, int8": {
        "policy": SlidingWindow(1, 0, positions="cache", rope=INTERLEAVED),
        "config": replace(CONFIG, quantization="int8"),
    },
    "least recently used, pages of one": {
        "policy": LeastRecentlyUsed(7, 0.4),
        "config": replace(CONFIG, page_size=1, num_pages=24, max_pages_per_seq=12),
    },
    "heavy hitter, few pages": {"policy": HeavyHitter(9, 3), "config": replace(CONFIG, num_pages=8)},
    "heavy hitter numbered anew": {
        "policy": HeavyHitter(8, 8, positions="cache", rope=HALF),
        "config": replace(CONFIG, num_kv_heads=1),
    },
    "semantic merge": {"policy": SemanticMerge(8, 3), "config": CONFIG},
    "semantic merge numbered anew": {
        "policy": SemanticMerge(7, 2, positions="cache", rope=INTERLEAVED),
        "config": CONFIG,
    },
    "semantic merge, int8, recent alone": {
        "policy": SemanticMerge(5, 0),
        "config": replace(CONFIG, quantization="int8", num_layers=1),
    },
    "semantic merge, int4": {
        "policy": SemanticMerge(6, 1),
        "config": replace(CONFIG, quantization="int4", head_dim=16),
    },
    "window that moves up, int4": {
        "policy": SlidingWindow(4, 1, positions="cache", rope=HALF),
        "config": replace(CONFIG, quantization="int4", head_dim=8),
    },
    "prompt compress": {
        "policy": PromptCompress(8, 3, kernel=3, positions="cache", rope=INTERLEAVED),
        "config": CONFIG,
    },
}


class PolicyMachine(Machine):
    def begin(self):
        return PolicyTwin(total_tokens=12, **self.shape)

    @rule(data=st.data())
    def evict(self, data):
        seqs = data.draw(entries(self.twin, self.slot))
        self.twin.evict(seqs)
        assert not any(self.twin.evict(seqs)), "the second time there is nothing to drop"

    @rule(data=st.data())
    def fill_and_evict(self, data):
        """Everybody at once, as a decode loop does."""
        seqs = data.draw(self.decode)[: self.twin.entries]
        self.twin.extend(seqs, [data.draw(st.integers(1, 4)) for _ in seqs])
        self.twin.evict(seqs)

    @precondition(lambda self: self.twin.policy.rope is not None)
    @rule(data=st.data())
    def shift(self, data):
        by = st.one_of(st.integers(-12, 6), st.sampled_from([-(2**31), 2**31 - 1]))
        self.twin.shift(*columns(data.draw(entries(self.twin, st.tuples(self.slot, by)))))


# A few histories of a window with sinks are in every run of `test_prefix_policy_machine`.
SLOW = {
    "window that moves up, int4",
    "window with sinks",
    "window of one, int8",
    "heavy hitter numbered anew",
    "semantic merge numbered anew",
    "semantic merge, int8, recent alone",
    "semantic merge, int4",
}
# Of two scores that differ by a rounding either may win: the same histories every time.
CASES = {
    name: machine(name, shape, PolicyMachine, examples=-(-EXAMPLES // 32), derandomize=True)
    for name, shape in SHAPES.items()
}
globals().update(
    {case.__name__: pytest.mark.slow(case) if name in SLOW else case for name, case in CASES.items()}
)
