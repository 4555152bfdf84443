"""The profile says what the oracle counts, and the device's own account agrees."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheConfig, MemoryProfile
from jaxkv.memory.device import PeakMemory, device_memory
from jaxkv.memory.page_owners import page_map
from jaxkv.memory.profile import unused_share
from tests import jitted
from tests.caches import PAGE_OF_ONE, SMALL, ints
from tests.twin import Twin

profile_of = jax.jit(jaxkv.memory_profile)
CONTIGUOUS = CacheConfig.contiguous(
    num_layers=2, num_kv_heads=2, head_dim=4, max_seqs=4, max_tokens=9, dtype="float32"
)
CODES = replace(SMALL, quantization="int8")


def assert_bytes(cache, profile):
    pool, table = cache.pool, cache.table
    assert profile.pool_bytes == size(pool) == profile.used_bytes + profile.free_bytes
    rows = table.pages, table.lengths, table.positions, table.fingerprint
    assert profile.page_table_bytes == size(rows)
    assert profile.allocator_bytes == size((table.refcounts, table.free_pages, table.num_free))
    assert profile.total_bytes == size(cache) == cache.config.estimated_memory_bytes()


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_a_static_cache_wastes_what_its_sequences_leave():
    """`Twin` holds every number against the oracle after every operation, here and in all tests."""
    twin = Twin(CONTIGUOUS)
    assert profile_of(twin.cache).efficiency == 1
    twin.extend([0, 2], [9, 3])
    assert profile_of(twin.cache).fragmentation == 6 / 18
    assert profile_of(twin.cache).scatter == 0
    twin.free([0])
    assert profile_of(twin.cache).scatter == 1 / 2


@pytest.mark.parametrize("config", [SMALL, PAGE_OF_ONE, CONTIGUOUS, CODES], ids=lambda c: f"{c.page_size}")
def test_bytes_are_those_of_the_arrays(config):
    cache, _ = jitted.allocate(jaxkv.init(config), ints(0), ints(3), total_tokens=4)
    for one in (jaxkv.init(config), cache):
        assert_bytes(one, profile_of(one))


def test_it_may_be_called_without_jit():
    cache, _ = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(3), total_tokens=4)
    assert jaxkv.memory_profile(cache).as_dict() == profile_of(cache).as_dict()


def test_a_shared_page_is_as_full_as_its_fullest_owner():
    cache, _ = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(7), total_tokens=8)
    cache, _ = jitted.fork(cache, ints(0), ints(1))
    profile = profile_of(jitted.truncate(cache, ints(1), ints(5))[0])
    assert (profile.stored_tokens, profile.tokens, profile.unused_token_slots) == (7, 12, 1)


def test_a_profile_outlives_a_donated_cache():
    free = jax.jit(jaxkv.free, donate_argnames="cache")
    for make in (jaxkv.memory_profile, profile_of):
        cache, _ = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(7), total_tokens=8)
        profile = make(cache)
        free(cache, ints(0))
        assert cache.table.lengths.is_deleted()
        assert (profile.tokens, profile.as_dict()["total_allocations"]) == (7, 2)


def test_bytes_and_tokens_may_pass_int32():
    """A pool of 2 TiB that nobody makes, and 4 billion tokens in 4,096 forks of one long sequence."""
    config = CacheConfig(
        num_layers=80, num_kv_heads=8, head_dim=128, num_pages=2**17, page_size=2**12, max_seqs=4096
    )
    profile = MemoryProfile(
        lengths=np.full(4096, 2**20, np.int32),
        row_lengths=np.full((1, 4096), 2**20, np.int32),
        num_used=np.int32(2**8),
        num_shared=np.int32(2**8),
        num_spanned=np.int32(2**8),
        num_stored=np.int32(2**20),
        num_slots=np.int32(2**20),
        stats=jaxkv.AllocationStats(np.zeros(8, np.int32)),
        config=config,
    )
    assert profile.tokens == 2**32
    assert profile.logical_pages == 2**20
    assert profile.pool_bytes == 2 * 80 * 8 * 128 * 2 * 2**29
    assert profile.bytes_per_token == 2 * 80 * 8 * 128 * 2


def two_profiles():
    """Of an empty cache, and of one with 7 tokens that a fork shares."""
    cache, _ = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(7), total_tokens=8)
    cache, _ = jitted.fork(cache, ints(0), ints(1))
    return [profile_of(one) for one in (jaxkv.init(SMALL), cache)]


def test_every_number_may_be_asked_for_within_jit():
    numbers = jax.jit(lambda profile: profile.as_dict())
    for profile in two_profiles():
        want, got = profile.as_dict(), numbers(profile)
        assert got.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)
        assert (got["free_pages"].dtype, got["usage"].dtype) == ("int32", "float32")


def test_stacked_profiles_give_a_number_for_each():
    profiles = two_profiles()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *profiles)
    for name, got in stacked.as_dict().items():
        want = [profile.as_dict()[name] for profile in profiles]
        np.testing.assert_array_equal(np.broadcast_to(got, 2), want, err_msg=name)
    for name, got in jax.jit(jax.vmap(lambda profile: profile.as_dict()))(stacked).items():
        np.testing.assert_allclose(got, np.broadcast_to(stacked.as_dict()[name], 2), rtol=1e-6, err_msg=name)


def test_bytes_and_tokens_within_jit_may_pass_int32():
    config = CacheConfig(num_layers=80, num_kv_heads=8, head_dim=128, num_pages=2**17, page_size=2**12)
    one = jnp.int32(2**16)
    stats = jaxkv.AllocationStats(jnp.zeros(10, jnp.int32))
    lengths, stored = jnp.full(4096, 2**20, jnp.int32), jnp.int32(2**28)
    profile = MemoryProfile(lengths, lengths[None], one, one, one, stored, stored, stats, config)
    got = jax.jit(lambda profile: profile.as_dict())(profile)
    for name in ("tokens", "unused_token_slots", "used_bytes", "free_bytes", "efficiency", "fragmentation"):
        np.testing.assert_allclose(got[name], getattr(profile, name), rtol=1e-6, err_msg=name)


def test_a_report_of_stacked_or_traced_profiles_says_how_to_get_one():
    profile, _ = two_profiles()
    with pytest.raises(ValueError, match=r"report\(\) takes one profile.*int32\[2,4\]"):
        jax.tree.map(lambda x: jnp.stack([x, x]), profile).report()
    with pytest.raises(ValueError, match="Return the profile from jit"):
        jax.jit(lambda profile: profile.report())(profile)


def test_the_report_has_aligned_columns_and_the_numbers():
    cache, _ = jitted.allocate(jaxkv.init(SMALL), ints(0, 1), ints(7, 1), total_tokens=8)
    lines = profile_of(cache).report().splitlines()
    assert lines[1].split() == ["used", "3", "pages", "1.50", "KiB,", "37.5%"]
    assert "4 of 12 owned token slots are unused" in next(x for x in lines if "fragmentation" in x)
    width = len("copy on write copies")
    assert all(line[width : width + 2] == "  " for line in lines)


def test_unused_share_of_lengths():
    assert unused_share([], 16) == 0
    assert unused_share([16, 32], 16) == 0
    assert unused_share([1], 16) == 15 / 16


# the device ------------------------------------------------------------------------------------


def test_the_cache_s_claim_is_what_the_device_holds():
    before = device_memory()
    cache = jax.block_until_ready(jaxkv.init(SMALL))
    weights = {"matrix": jnp.zeros((16, 16)), "key": jax.random.key(0)}
    after = device_memory(cache, weights=weights)
    profile = profile_of(cache)
    assert after.kv_pool == profile.pool_bytes
    assert after.tables == profile.total_bytes - profile.pool_bytes
    assert after.weights == 1024 + 8
    assert after.source in ("live_arrays", "memory_stats")
    if after.source == "live_arrays":
        grown = after.in_use - before.in_use
        assert 0 <= grown - profile.total_bytes - after.weights <= size(profile)
        assert after.other == before.in_use + grown - profile.total_bytes - after.weights
    assert "kv pool" in after.report() and set(after.as_dict()) >= {"in_use", "other", "limit"}


def test_the_peak_over_a_block_is_of_what_was_sampled():
    with PeakMemory() as memory:
        start = memory.peak
        array = jnp.zeros(2**18)
        memory.sample()
        del array
    assert memory.peak >= start + 2**20
    assert memory.is_exact is (jax.local_devices()[0].memory_stats() is not None)
    with PeakMemory() as memory:
        pass
    assert memory.peak < start + 2**20


def test_an_allocator_s_own_peak_is_exact_where_it_rose_and_never_lost():
    class Device:
        peak = 100

        def memory_stats(self):
            return {"bytes_in_use": 50, "peak_bytes_in_use": self.peak, "bytes_limit": 1000}

    device = Device()
    with PeakMemory(device) as memory:
        device.peak = 300
    assert (memory.peak, memory.is_exact) == (300, True)
    with PeakMemory(device) as memory:
        pass
    assert (memory.peak, memory.is_exact) == (50, False)


# the map -----------------------------------------------------------------------------------------


def test_the_map_turns_the_page_table_round():
    cache, _ = jitted.allocate(jaxkv.init(SMALL), ints(0, 1, 2), ints(4, 6, 3), total_tokens=16)
    cache, _ = jitted.fork(cache, ints(1), ints(3))
    cells = page_map(jitted.free(cache, ints(0)))
    assert cells.owner.tolist() == [4, 1, 1, 2, 4, 4, 4, 4]
    assert cells.num_owners.tolist() == [0, 2, 2, 1, 0, 0, 0, 0]
    assert cells.tokens.tolist() == [0, 4, 2, 3, 0, 0, 0, 0]
    assert cells.holes.tolist() == [True] + [False] * 7
    assert cells.text(60).splitlines()[0] == "0 ·▓▓▆····"
    assert cells.text(60, ascii_only=True).isascii()
    pairs = cells.grouped(2)
    assert pairs.owner.tolist() == [1, 1, 4, 4]
    assert pairs.tokens.tolist() == [4, 5, 0, 0]
    assert cells.grouped(3).num_cells == 3


@pytest.mark.parametrize("width", [1, 20, 40, 80, 300])
@pytest.mark.parametrize("num_pages", [1, 7, 100, 70_000])
def test_the_map_in_characters_keeps_to_its_width(width, num_pages):
    config = replace(SMALL, num_pages=num_pages, max_pages_per_seq=1)
    lines = page_map(jitted.init(config)).text(width, rows=16).splitlines()
    assert all(len(line) <= max(width, 20) for line in lines)
    assert len([line for line in lines if line.lstrip()[0].isdigit()]) <= 16
