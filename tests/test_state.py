"""What a user reads off the cache's own records: statuses, batches, statistics."""

import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv import Status
from tests import jitted
from tests.caches import SMALL, filled, ints


def test_help_explains_every_status():
    text = inspect.getdoc(Status)
    assert text is not None
    assert all(f"  {member.name}: " in text for member in Status)


def test_ok_and_last_rows_of_entries_of_every_kind():
    cache, _ = filled(SMALL, (6, 3))
    seqs, counts = ints(-1, 0, 1, 9, 2, 3, -1), ints(0, 2, 0, 1, 17, 1, 0)
    _, batch = jitted.allocate(cache, seqs, counts, total_tokens=24)
    assert batch.status.tolist() == [
        Status.PADDING,
        Status.OK,
        Status.OK,
        Status.INVALID_SEQ,
        Status.SEQUENCE_TOO_LONG,
        Status.OK,
        Status.PADDING,
    ]
    assert batch.ok.tolist() == [False, True, True, False, False, True, False]
    # Entries without tokens have another's row, or 0; refused ones the last that they asked for.
    assert batch.last_rows.tolist() == [0, 1, 1, 2, 19, 20, 20]
    assert batch.entries.tolist() == [1] * 2 + [3] + [4] * 17 + [5] + [7] * 3


def test_last_rows_are_rows_even_of_entries_that_reach_past_the_token_axis():
    _, batch = jitted.allocate(jaxkv.init(SMALL), ints(0, 1, 2), ints(2, 9, -3), total_tokens=4)
    assert batch.status.tolist() == [Status.OK, Status.INVALID_LENGTH, Status.INVALID_LENGTH]
    assert batch.last_rows.tolist() == [1, 3, 3]


def test_statistics_print_their_counters_by_name():
    stats = filled(SMALL, (6, 3))[0].stats
    assert repr(stats).startswith(
        "AllocationStats(total_allocations=3, total_deallocations=0, current_pages=3"
    )
    assert stats.as_dict() == {name: int(getattr(stats, name)) for name in stats.names()}
    assert all(type(value) is int for value in stats.as_dict().values())


def test_stacked_statistics_print_a_list_a_counter():
    stats = jax.tree.map(lambda x: jnp.stack([x, x + 1]), jaxkv.init(SMALL).stats)
    assert "evicted_tokens=[0, 1]" in repr(stats)
    np.testing.assert_array_equal(stats.as_dict()["evictions"], [0, 1])


def test_statistics_print_within_jit_after_donation_and_of_shapes():
    def traced(stats):
        assert repr(stats).startswith("AllocationStats(counters=")
        return stats.as_dict()["peak_pages"] + 1

    stats = jaxkv.init(SMALL).stats
    assert jax.jit(traced)(stats) == 1
    assert "ShapeDtypeStruct" in repr(jax.eval_shape(lambda: stats))
    assert "object" in repr(replace(stats, counters=object()))
    gone = replace(stats, counters=jnp.zeros(10, jnp.int32))
    gone.counters.delete()
    assert repr(gone) == "AllocationStats(counters=<deleted>)"


def test_what_programs_need_is_exported():
    names = "reorder lengths pack merge_attention use_backend CausalLM Policy"
    assert all(callable(getattr(jaxkv, name)) for name in names.split())
