"""Every row of q in one tile, every key tile in one item, items of even size."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import cost
from pallas_kernels.paged_attention import schedule
from tests.kernels.cases import Case, make

sequences = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 12)), min_size=1, max_size=6)


def tiles_of(lengths, queries, padding, size):
    starts = np.cumsum([0, *queries])
    tokens = int(starts[-1]) + padding
    rows = jnp.arange(len(lengths), dtype=jnp.int32)[::-1]
    tiles = schedule.query_tiles(
        tokens, size, jnp.array(lengths, jnp.int32), jnp.array(starts, jnp.int32), rows
    )
    return tokens, tiles


@settings(max_examples=60, deadline=None)
@given(
    sequences,
    st.integers(0, 7),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 3, 40]),
    st.integers(1, 9),
)
def test_every_row_and_every_visible_key_is_somebodys_work(pairs, padding, size, window, spare):
    lengths = [max(length, queries) if length else 0 for length, queries in pairs]
    queries = [queries for _, queries in pairs]
    tokens, tiles = tiles_of(lengths, queries, padding + (sum(queries) == 0), size)
    num_tiles = schedule.num_query_tiles(tokens, len(pairs), size)
    assert all(part.shape == (num_tiles,) for part in tiles)

    owner = [len(pairs)] * tokens
    for seq, (start, count) in enumerate(zip(np.cumsum([0, *queries]), queries, strict=False)):
        owner[start : start + count] = [seq] * count
    covered = []
    for n in range(num_tiles):
        first, count = int(tiles.first_row[n]), int(tiles.num_rows[n])
        assert count <= size
        rows = range(first, first + count)
        covered += rows
        owners = {owner[row] for row in rows}
        assert len(owners) <= 1
        for seq in owners - {len(pairs)}:
            assert int(tiles.table_row[n]) == len(pairs) - 1 - seq
            place = lengths[seq] - queries[seq] + first - sum(queries[:seq])
            assert int(tiles.first_place[n]) == place
            assert int(tiles.num_keys[n]) == (place + count if lengths[seq] else 0)
        if owners == {len(pairs)}:
            assert int(tiles.num_keys[n]) == 0
    assert sorted(covered) == list(range(tokens))

    key_tile, num_items = 8, num_tiles + spare
    items = schedule.share(tiles, num_items, key_tile, window)
    whole = schedule.whole(tiles, key_tile, window)
    for n in range(num_tiles):
        want = set(range(int(whole.begin[n]), int(whole.end[n])))
        mine = range(int(items.starts[n]), int(items.starts[n + 1]))
        shares = [range(int(items.begin[i]), int(items.end[i])) for i in mine]
        assert all(int(items.tile[i]) == n for i in mine)
        assert all(shares)
        assert sorted(key for share in shares for key in share) == sorted(want)
        if window is None:
            assert want == set(range(-(-int(tiles.num_keys[n]) // key_tile)))
    assert int(items.starts[-1]) <= num_items
    for i in range(int(items.starts[-1]), num_items):
        assert int(items.begin[i]) == int(items.end[i]) == 0


def test_a_long_sequence_is_cut_as_finely_as_many_short_ones_allow():
    """One of 32,768 tokens beside 63 of 10: no item is longer than its fair share."""
    lengths = [32768] + [10] * 63
    _, tiles = tiles_of(lengths, [1] * 64, 0, 1)
    items = schedule.share(tiles, 128, 64, None)
    sizes = np.asarray(items.end - items.begin)
    assert sizes.max() == -(-(512 + 63) // 64)
    assert np.count_nonzero(sizes) == 63 + -(-512 // sizes.max())


def test_flops_and_bytes_are_those_counted_by_hand():
    """Two sequences of 5 and 3 tokens, 1 and 2 queries, 4 query heads on 2 KV heads of 8, bfloat16 pool."""
    keys, pairs = cost.causal([5, 3], [1, 2])
    assert (keys, pairs) == (5 + 3, 5 + 2 + 3)
    counted = cost.paged_attention(
        num_keys=keys,
        num_pairs=pairs,
        tokens=3,
        q_heads=4,
        kv_heads=2,
        head_dim=8,
        q_dtype=jnp.float32,
        kv_dtype=jnp.bfloat16,
    )
    products = 2 * 10 * 4  # q with k, and p with v: for each pair and query head
    assert counted.flops == products * 8 * 2  # a multiplication and an addition a dimension
    assert counted.transcendentals == 10 * 4
    assert counted.bytes_accessed == 2 * 8 * 2 * 8 * 2 + 2 * 3 * 4 * 8 * 4
    assert cost.causal([5, 3], [0, 2]) == (3, 5)

    appended = cost.append_kv(tokens=3, kv_heads=2, head_dim=8, dtype=jnp.float32, pool_dtype=jnp.float16)
    assert (appended.flops, appended.bytes_accessed) == (0, 2 * 3 * 2 * 8 * (4 + 2))
    copied = cost.copy_pages(copies=5, layers=3, page_numbers=2 * 4 * 8, dtype=jnp.bfloat16)
    assert copied.bytes_accessed == 2 * 2 * 5 * 3 * 64 * 2


@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_cost_of_a_case_counts_the_keys_that_the_case_has(page_size):
    case = Case("", (33, 0, 5), (2, 0, 5), page_size=page_size)
    arguments = make(case)
    keys, pairs = cost.causal(case.lengths, case.num_queries)
    assert keys == int(arguments.kv_lengths.sum())
    assert pairs == sum(33 - 1 + n for n in range(2)) + sum(range(1, 6))
