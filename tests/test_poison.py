"""No read ever reaches a page that is not the sequence's own.

Every page is NaN from the moment it is given back until its next owner writes to it, and so is the
whole pool at the start: one stray read, and an output or a gathered token is NaN.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from tests import jitted
from tests.caches import SMALL, filled, ints
from tests.twin import Twin

STEPS = 500  # each of two configs

ROOMY = replace(SMALL, num_pages=20, max_seqs=6, max_pages_per_seq=6)
TIGHT = replace(SMALL, num_pages=11, page_size=3, max_seqs=6, max_pages_per_seq=11, num_kv_heads=1)


@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_a_thousand_mixed_steps_never_show_a_freed_page(config):
    """The twin looks at every output of every step; here are the steps."""
    twin, random = Twin(config, entries=6, total_tokens=12), np.random.default_rng(0)

    def some_slots():
        return random.permutation(config.max_seqs)[: random.integers(1, config.max_seqs + 1)]

    for _ in range(STEPS):
        slots, lengths = some_slots(), [s.length for s in twin.oracle.sequences]
        match random.choice(["decode", "prefill", "fork", "free", "truncate", "compact"],
                            p=[0.35, 0.1, 0.25, 0.15, 0.1, 0.05]):  # fmt: skip
            case "decode":
                twin.extend(slots, [1] * len(slots))
            case "prefill":
                twin.extend(slots[:2], random.integers(1, 7, size=len(slots[:2])))
            case "fork":
                twin.fork(random.permutation(slots), slots)
            case "free":
                twin.free(slots[:2])
            case "truncate":
                twin.truncate(slots, [random.integers(0, lengths[slot] + 1) for slot in slots])
            case "compact":
                twin.compact()
    stats = jax.device_get(twin.cache.stats)
    assert stats.copy_on_write_copies > 20
    assert stats.pages_moved > 20
    assert stats.refused_allocations > 20
    assert stats.total_allocations > 10 * config.num_pages, "pages were used again and again"


def test_poison_would_be_seen():
    """The net is not torn: a row that names a freed page shows NaN in gather and in attend."""
    cache, _ = filled(SMALL, (4, 4))
    mine, other = int(cache.table.pages[0, 0]), 7
    cache = replace(cache, table=replace(cache.table, pages=cache.table.pages.at[0, 0].set(other)))
    assert mine != other
    k, _, _ = jitted.gather(cache, 0, ints(0))
    assert np.isnan(k).any()
    cache, batch = jitted.allocate(cache, ints(0), ints(1))
    q = np.ones((1, 2, SMALL.head_dim), np.float32)
    assert np.isnan(jitted.attend(cache, 0, batch, jax.numpy.asarray(q))).any()
