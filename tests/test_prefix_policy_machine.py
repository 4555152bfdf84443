"""As `test_prefix_machine`, where a policy drops tokens and shifts others: neither are intact then."""

from dataclasses import replace
from typing import ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import precondition, rule

from jaxkv.policies import SlidingWindow
from tests.test_policy_machine import HALF, INTERLEAVED, PolicyMachine
from tests.test_prefix_machine import PrefixMachine, with_prefixes
from tests.test_state_machine import BASE, EXAMPLES, machine


class WhenAsked(SlidingWindow):
    """`allocate` drops nothing; a user calls `evict`."""

    once: ClassVar[bool] = True


CONFIG = replace(BASE, max_seqs=4, page_size=2, num_pages=12, max_pages_per_seq=8)
SHAPES = {
    "prefixes, a window that moves up": {
        "policy": SlidingWindow(3, 3, positions="cache", rope=HALF),
        "config": CONFIG,
    },
    "prefixes, a window with sinks": {"policy": SlidingWindow(5, 3, rope=HALF), "config": CONFIG},
    "prefixes, a window when asked, int8": {
        "policy": WhenAsked(1, 2, positions="cache", rope=INTERLEAVED),
        "config": replace(CONFIG, num_pages=10, quantization="int8"),
    },
    "prefixes, a window in the full layer among windows": {
        "policy": SlidingWindow(4, 2),
        "config": replace(
            CONFIG, num_layers=3, num_pages=24, layer_windows=(5, None, 5), max_chunk=9, rollback=1
        ),
    },
}


class PrefixPolicyMachine(PolicyMachine, PrefixMachine):
    drop_by_policy = None  # the policy itself does

    @precondition(lambda self: self.twin.policy.rope is not None)
    @rule(data=st.data(), by=st.integers(1, 4))
    def shift_a_live_one(self, data, by):
        live = self.slots_by(lambda position: position > 0)
        if live:
            self.twin.shift([data.draw(st.sampled_from(live))], [by])


# Every run has a few histories of the one that compiles in the least time.
CASES = {
    name: machine(name, with_prefixes(shape), PrefixPolicyMachine, examples=-(-EXAMPLES // 16))
    for name, shape in SHAPES.items()
}
globals().update({case.__name__: pytest.mark.slow(case) for case in CASES.values()})
WITH_SINKS = with_prefixes(SHAPES["prefixes, a window with sinks"])
TestFewHistories = machine("few histories", WITH_SINKS, PrefixPolicyMachine, examples=6)
