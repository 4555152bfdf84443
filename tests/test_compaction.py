"""Defragmentation: pages move, contents do not."""

import importlib
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheConfig, Status
from jaxkv.testing import assert_caches_equivalent, assert_in_place
from tests import jitted
from tests.caches import SMALL
from tests.edges import at_every_edge, brought_to
from tests.twin import Twin

PACKED = CacheConfig(
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    num_pages=97,
    page_size=2,
    max_seqs=9,
    max_pages_per_seq=20,
    dtype="float32",
)


@at_every_edge
def test_pages_go_to_the_lowest_ids_in_order_and_stay_there(situation, config):
    twin = brought_to(situation, config)
    twin.compact()
    assert twin.compact() == 0
    twin.extend(range(config.max_seqs), [1] * config.max_seqs)


def test_holes_are_closed_from_above():
    twin = Twin(SMALL)
    twin.extend([0, 1], [4, 4])
    twin.free([0])
    assert twin.compact() == 1
    assert twin.pages(1) == [0]


def test_an_empty_and_a_packed_cache_move_nothing():
    twin = Twin(SMALL)
    assert twin.compact() == 0
    twin.extend([0, 1], [5, 3])
    assert twin.compact() == 0
    assert twin.cache.stats.compactions == 2


def test_interleaved_sequences_are_sorted_apart():
    twin = Twin(SMALL)
    for _ in range(3):
        twin.extend([1, 0], [4, 1])
    twin.truncate([0], [2])
    twin.extend([0], [7])
    twin.compact()
    assert twin.pages(0) == [0, 1, 2]
    assert twin.pages(1) == [3, 4, 5]


def test_shared_pages_stay_shared():
    twin = Twin(SMALL)
    twin.extend([3, 2], [2, 6])
    twin.fork([2, 2], [0, 1])
    twin.extend([1], [1])
    twin.free([3])
    twin.compact()
    assert twin.pages(0)[:1] == twin.pages(1)[:1] == twin.pages(2)[:1]
    assert twin.oracle.num_free == SMALL.num_pages - 3


def test_a_full_pool_in_the_worst_order_is_sorted():
    """No free page to go through: every page trades places."""
    twin = Twin(SMALL)
    for slot in (3, 2, 1, 0):
        twin.extend([slot], [8])
    assert twin.compact() == 8
    assert [twin.pages(slot) for slot in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_any_arrangement_in_chunks_of_any_size(monkeypatch, traced_anew):
    """What one chunk displaces, a later one must find."""
    module = importlib.import_module("pallas_kernels.move_pages.xla")
    twin, random, arranged = Twin(PACKED, entries=9), np.random.default_rng(0), []
    for _ in range(4):
        for _ in range(4):
            slots = random.permutation(9)[:5]
            twin.extend(slots, random.integers(1, 7, size=5))
            twin.truncate(slots[:2], random.integers(0, 9, size=2))
            twin.fork(slots[:2], slots[2:4])
            twin.free(random.permutation(9)[:1])
        arranged.append(jax.tree.map(jnp.copy, twin.cache))
    tables = [[] for _ in arranged]
    for chunk in (1, 7, 100):
        monkeypatch.setattr(module, "_CHUNK_BYTES", chunk * 2 * PACKED.page_bytes)
        jax.clear_caches()  # `compact` is compiled anew, once for a size of chunk
        for before, results in zip(arranged, tables, strict=True):
            cache, num_moved = jitted.compact(before)
            assert num_moved > 7
            jaxkv.check_invariants(cache)
            assert_caches_equivalent(before, cache)
            results.append(jax.device_get(cache.table))
    for results in tables:
        for table in results[1:]:
            chex.assert_trees_all_equal(table, results[0])


def test_contents_are_the_same_wherever_the_pages_lie():
    twin = Twin(SMALL)
    twin.extend([0, 1, 2], [3, 4, 1])
    twin.free([0])
    before = jax.tree.map(jnp.copy, twin.cache)
    twin.compact()
    assert_caches_equivalent(before, twin.cache)


def test_a_batch_made_after_compaction_serves():
    twin = Twin(SMALL)
    twin.extend([0, 1], [4, 3])
    twin.free([0])
    twin.compact()
    assert twin.extend([1, 0], [3, 1]) == [Status.OK, Status.OK]


@pytest.mark.parametrize(
    ("threshold", "live", "expected"),
    [
        (0.3, [], False),
        (0.3, [0, 1, 2], False),
        (0.3, [3], True),  # three holes of four
        (0.5, [0, 3], False),  # two of four: not more than half
        (0.49, [0, 3], True),
        (0.0, [0, 2], True),
        (0.0, [0, 1], False),
        (1.0, [7], False),
    ],
)
def test_should_compact_by_the_share_of_holes_below_the_highest_live_page(threshold, live, expected):
    config = replace(SMALL, max_seqs=8, max_pages_per_seq=1)
    slots = jnp.arange(8, dtype=jnp.int32)
    cache, _ = jitted.allocate(jaxkv.init(config), slots, jnp.ones_like(slots))
    cache = jitted.free(cache, jnp.array([-1 if slot in live else slot for slot in range(8)]))
    compacted, _ = jitted.compact(cache)
    for one, answer in ((cache, expected), (compacted, False)):
        asked = replace(one, config=replace(config, compaction_threshold=threshold))
        got = jax.jit(jaxkv.should_compact)(asked)
        assert (got.dtype, got.shape) == (jnp.bool_, ())
        assert bool(got) is answer


@pytest.mark.parametrize("live", [[3], [0, 1], []], ids=["due", "packed", "empty"])
def test_maybe_compact_does_what_compact_does_when_due_and_else_nothing(live):
    config = replace(SMALL, max_seqs=8, max_pages_per_seq=1)
    slots = jnp.arange(8, dtype=jnp.int32)
    cache, _ = jitted.allocate(jaxkv.init(config), slots, jnp.ones_like(slots))
    cache = jitted.free(cache, jnp.array([-1 if slot in live else slot for slot in range(8)]))
    want = jitted.compact(cache)[0] if live == [3] else cache
    got = jax.jit(jaxkv.maybe_compact, donate_argnums=0)(jax.tree.map(jnp.copy, cache))
    chex.assert_trees_all_equal(
        jax.device_get((got.table, got.stats)), jax.device_get((want.table, want.stats))
    )
    assert_caches_equivalent(got, want)


@pytest.mark.parametrize("quantization", [None, "int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_maybe_compact_is_in_place(quantization):
    """Compiled only: chunks of 16 MiB beside a pool of 1 GiB. For a GPU, tests/compiled/check_aot.py asks."""
    config = CacheConfig(
        num_layers=4,
        num_kv_heads=8,
        head_dim=64,
        num_pages=2**12 if quantization is None else 2**14,
        dtype="float32",
        max_pages_per_seq=16,
        quantization=quantization,
    )
    cache = jax.eval_shape(lambda: jaxkv.init(config))
    assert_in_place(jaxkv.maybe_compact, cache)

    def steps(cache, seqs):
        def step(_, cache):
            return jaxkv.allocate(jaxkv.maybe_compact(cache), seqs, jnp.ones_like(seqs))[0]

        return jax.lax.fori_loop(0, 10, step, cache)

    assert_in_place(steps, cache, jnp.arange(4))


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_compact(self):
        cache, _ = jitted.allocate(jaxkv.init(SMALL), jnp.array([0, 1, 2]), jnp.array([1, 1, 1]))
        cache = jitted.free(cache, jnp.array([1]))
        compacted, num_moved = self.variant(jaxkv.compact)(cache)
        assert num_moved == 1
        assert compacted.table.pages[2, 0] == 1
        assert compacted.table.free_pages[:6].tolist() == [7, 6, 5, 4, 3, 2]
        jaxkv.check_invariants(compacted)
        assert_caches_equivalent(cache, compacted)
