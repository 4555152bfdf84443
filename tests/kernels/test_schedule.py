"""Every row of q in one tile, every key tile in one item, items of even size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import cost, formats
from pallas_kernels.paged_attention import prefixes, schedule
from pallas_kernels.reference.cases import Case, make

SEQS, TOKENS, KEY_TILE = 5, 48, 8
sequences = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 9)), min_size=SEQS, max_size=SEQS)


@partial(jax.jit, static_argnums=(0, 1, 4))
def tiles_of(tokens, size, lengths, queries, window=None):
    """Tiles of sequences that lie in the page table from the last row to the first."""
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(queries, dtype=jnp.int32)])
    rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)[::-1]
    return schedule.query_tiles(tokens, size, lengths, starts, rows, window=window)


share = jax.jit(schedule.share, static_argnums=(1, 2))
whole = jax.jit(schedule.whole, static_argnums=1)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("window", [None, 3, 40])
@settings(max_examples=40, deadline=None)
@given(pairs=sequences, spare=st.sampled_from([1, 7]))
def test_every_row_and_every_visible_key_is_somebodys_work(pairs, spare, window, size):
    lengths = [max(length, queries) if length else 0 for length, queries in pairs]
    queries = [queries for _, queries in pairs]
    arrays = np.array(lengths, np.int32), np.array(queries, np.int32)
    tiles = jax.tree.map(np.asarray, tiles_of(TOKENS, size, *arrays, window))
    num_tiles = schedule.num_query_tiles(TOKENS, SEQS, size)
    assert all(part.shape == (num_tiles,) for part in tiles)

    owner = [seq for seq, count in enumerate(queries) for _ in range(count)]
    owner += [SEQS] * (TOKENS - len(owner))
    covered = []
    for table_row, first, count, first_place, first_key, num_keys in zip(
        *map(np.ndarray.tolist, tiles), strict=True
    ):
        rows = range(first, first + count)
        covered += rows
        owners = {owner[row] for row in rows}
        assert count <= size
        assert len(owners) <= 1
        if owners <= {SEQS}:
            assert num_keys == 0
            continue
        (seq,) = owners
        place = lengths[seq] - queries[seq] + first - sum(queries[:seq])
        assert (table_row, first_place) == (SEQS - 1 - seq, place)
        assert first_key == (0 if window is None else max(0, place - window + 1))
        assert num_keys == (place + count if lengths[seq] else 0)
    assert sorted(covered) == list(range(TOKENS))

    num_items = num_tiles + spare
    items = jax.tree.map(np.asarray, share(tiles, num_items, KEY_TILE))
    wanted = jax.tree.map(np.asarray, whole(tiles, KEY_TILE))
    for tile in range(num_tiles):
        want = range(wanted.begin[tile], wanted.end[tile])
        mine = range(items.starts[tile], items.starts[tile + 1])
        shares = [range(items.begin[item], items.end[item]) for item in mine]
        assert all(items.tile[item] == tile for item in mine)
        assert all(shares)
        assert [key for share in shares for key in share] == list(want)
        if window is None:
            assert want == range(-(-tiles.num_keys[tile] // KEY_TILE))
    assert items.starts[-1] <= num_items
    past = slice(int(items.starts[-1]), None)
    assert not items.begin[past].any()
    assert not items.end[past].any()


@pytest.mark.parametrize("sink_tokens", [0, 1, 8, 13, 100])
@pytest.mark.parametrize("window", [1, 9, 40])
def test_a_window_with_sink_tokens_visits_what_somebody_sees_and_nothing_twice(window, sink_tokens):
    lengths, queries = np.array([90, 0, 41, 8, 3], np.int32), np.array([9, 2, 1, 8, 1], np.int32)
    tiles = tiles_of(TOKENS, 4, lengths, queries, window)
    items = jax.tree.map(np.asarray, schedule.whole(tiles, KEY_TILE, sink_tokens=sink_tokens))
    visits = jax.vmap(schedule.stands_for, in_axes=(0, None, None))
    for tile, (begin, end) in enumerate(zip(items.begin, items.end, strict=True)):
        keys = jnp.arange(begin, end, dtype=jnp.int32)
        visited = visits(keys, tiles.first_key[tile] // KEY_TILE, jnp.asarray(begin)).tolist()
        rows = range(int(tiles.num_rows[tile])) if tiles.num_keys[tile] else ()
        places = [int(tiles.first_index[tile]) + row for row in rows]
        seen = {
            place // KEY_TILE
            for row in places
            for place in range(row + 1)
            if place > row - window or place < sink_tokens
        }
        assert sorted(visited) == sorted(seen)


def test_a_long_sequence_is_cut_as_finely_as_many_short_ones_allow():
    """One of 32,768 tokens beside 63 of 10: no item is longer than its fair share."""
    lengths = np.array([32768] + [10] * 63, np.int32)
    tiles = tiles_of(64, 1, lengths, np.ones(64, np.int32))
    items = schedule.share(tiles, 128, 64)
    sizes = np.asarray(items.end - items.begin)
    assert sizes.max() == -(-(512 + 63) // 64)
    assert np.count_nonzero(sizes) == 63 + -(-512 // sizes.max())


def test_what_is_cut_is_cut_evenly():
    """64 of 128 key tiles for 66 items more than tiles: 64 and 64 of each, not 125 and 3."""
    tiles = tiles_of(64, 1, np.full(64, 8192, np.int32), np.ones(64, np.int32))
    items = schedule.share(tiles, 130, 64)
    sizes = np.asarray(items.end - items.begin)
    assert np.unique(sizes[sizes > 0]).tolist() == [64]
    assert sizes.sum() == 64 * 128


PAGE, UNIT, MOST_SEQS = 4, 8, 7
TOKEN_BYTES, PARTIAL_BYTES = 16, 24
forests = st.lists(
    st.tuples(
        st.integers(0, 4),  # which of the sequences before it a sequence forks from
        st.integers(0, 12),  # pages it takes from there
        st.integers(0, 20),  # tokens of its own
        st.integers(0, 3),  # of them, those that ask
    ),
    min_size=1,
    max_size=MOST_SEQS,
)


@settings(max_examples=200, deadline=None)
@given(forest=forests)
def test_a_run_shares_what_all_its_sequences_begin_with(forest):
    rows, lengths, queries, fresh = [], [], [], iter(range(1000))
    for parent, pages, own, asked in forest:
        base = rows[-1 - parent][: min(pages, lengths[-1 - parent] // PAGE)] if parent < len(rows) else []
        length = len(base) * PAGE + own
        rows.append(base + [next(fresh) for _ in range(-(-length // PAGE) - len(base))])
        lengths.append(length)
        queries.append(min(asked, length))
    absent = MOST_SEQS - len(rows)
    rows, lengths, queries = rows + [[]] * absent, lengths + [0] * absent, queries + [0] * absent
    table = np.full((MOST_SEQS, 40), 1000, np.int32)
    for row, pages in enumerate(rows):
        table[row, : len(pages)] = pages
    starts = np.cumsum([0, *queries], dtype=np.int32)
    found = find(
        jnp.asarray(table), jnp.arange(len(rows)), jnp.asarray(lengths, jnp.int32), jnp.asarray(starts)
    )
    found = jax.tree.map(np.asarray, found)

    assert found.query_starts[0] == 0
    assert found.query_starts[-1] == starts[-1]
    asking = [seq for seq, asked in enumerate(queries) if asked]
    covered = []
    for run, shared in enumerate(found.lengths):
        first, end = found.query_starts[run : run + 2]
        members = [seq for seq in asking if first <= starts[seq] < end]
        covered += members
        assert shared % UNIT == 0
        assert all(found.skipped[seq] == shared for seq in members)
        if shared:
            pages = -(-shared // PAGE)
            assert len(members) > 1
            assert all(rows[seq][:pages] == rows[found.table_rows[run]][:pages] for seq in members)
            assert all(shared <= lengths[seq] - queries[seq] for seq in members)
            saved = (len(members) - 1) * shared * TOKEN_BYTES
            assert saved > 2 * PARTIAL_BYTES * (end - first)
    assert covered == asking
    assert not any(found.skipped[seq] for seq in range(len(rows)) if seq not in asking)


find = jax.jit(
    partial(prefixes.find, page_size=PAGE, unit=UNIT, token_bytes=TOKEN_BYTES, partial_bytes=PARTIAL_BYTES)
)


def test_two_runs_of_samples_behind_one_short_prefix_keep_their_long_ones():
    """Sequences 0 1 and 2 3 share ten pages each, all four share two."""
    table = np.array([[0, 1, *range(first, first + 8), 90 + n] for n, first in enumerate((10, 10, 20, 20))])
    arrays = jnp.asarray(table), jnp.arange(4), jnp.full(4, 41), jnp.arange(5)
    found = find(*(array.astype(jnp.int32) for array in arrays))
    np.testing.assert_array_equal(found.lengths, [40, 40, 0, 0])
    np.testing.assert_array_equal(found.query_starts, [0, 2, 4, 4, 4])


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
        storage=formats.named("bfloat16"),
    )
    products = 2 * 10 * 4  # q with k, and p with v: for each pair and query head
    assert counted.flops == products * 8 * 2  # a multiplication and an addition a dimension
    assert counted.transcendentals == 10 * 4
    assert counted.bytes_accessed == 2 * 8 * 2 * 8 * 2 + 2 * 3 * 4 * 8 * 4
    assert cost.causal([5, 3], [0, 2]) == (3, 5)

    appended = cost.append_kv(
        tokens=3, kv_heads=2, head_dim=8, dtype=jnp.float32, storage=formats.named("float16")
    )
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
