"""Static sizes, their checks, and the empty cache they describe."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheConfig

SIZES = {"num_layers": 2, "num_kv_heads": 4, "head_dim": 64, "num_pages": 128}


def test_defaults():
    config = CacheConfig(**SIZES)
    assert (config.page_size, config.max_seqs, config.max_pages_per_seq) == (16, 64, 128)
    assert (config.dtype, config.quantization, config.compaction_threshold) == ("bfloat16", None, 0.3)


def test_what_follows_from_the_sizes():
    config = CacheConfig(**SIZES, page_size=8, max_pages_per_seq=5)
    assert config.max_tokens_per_seq == 40
    assert config.pool_shape == (2, 128, 4, 8, 64)


def test_config_is_hashable_frozen_and_equal_by_value():
    config = CacheConfig(**SIZES)
    assert hash(config) == hash(CacheConfig(**SIZES))
    assert config == CacheConfig(**SIZES)
    assert config != CacheConfig(**SIZES, page_size=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.page_size = 8


def test_a_dtype_may_be_given_as_jax_gives_it():
    assert CacheConfig(**SIZES, dtype=jnp.float16) == CacheConfig(**SIZES, dtype="float16")


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True], ids=repr)
@pytest.mark.parametrize(
    "field",
    ["num_layers", "num_kv_heads", "head_dim", "num_pages", "page_size", "max_seqs", "max_pages_per_seq"],
)
def test_a_size_that_is_no_positive_integer_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}.*positive"):
        CacheConfig(**{**SIZES, field: value})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("dtype", "int8", "float32, bfloat16, float16"),
        ("dtype", "flaot32", "float32, bfloat16, float16"),
        ("quantization", "int3", "None, 'int8', 'fp8', 'int4'"),
        ("compaction_threshold", -0.1, "0 to 1"),
        ("compaction_threshold", 1.5, "0 to 1"),
        ("compaction_threshold", float("nan"), "0 to 1"),
        ("max_pages_per_seq", 129, "128"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field}={value!r}.*{allowed}"):
        CacheConfig(**SIZES, **{field: value})


def test_places_that_int32_cannot_count_are_refused():
    with pytest.raises(ValueError, match="page_size"):
        CacheConfig(**{**SIZES, "num_pages": 2**16}, page_size=2**16)


def test_a_contiguous_cache_is_one_page_a_sequence():
    config = CacheConfig.contiguous(
        num_layers=2, num_kv_heads=4, head_dim=64, max_seqs=8, max_tokens=100, dtype="float32"
    )
    assert config.pool_shape == (2, 8, 4, 100, 64)
    assert (config.max_seqs, config.max_tokens_per_seq, config.max_pages_per_seq) == (8, 100, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_empty_cache_is_zero_and_all_free(dtype):
    config = CacheConfig(**SIZES, dtype=dtype)
    cache = jaxkv.init(config)
    for pool in (cache.pool.k, cache.pool.v):
        assert pool.shape == config.pool_shape
        assert pool.dtype == config.storage_dtype
        assert not np.asarray(pool).any()
    k, v, _ = jaxkv.gather(cache, 0, jnp.array([0]))
    assert k.dtype == v.dtype == dtype
    assert cache.pool.k_scale is None
    assert cache.table.num_free == 128
    assert cache.table.free_pages[::-1].tolist() == list(range(128))
    assert not cache.table.lengths.any()
    assert not cache.table.positions.any()
    assert not cache.table.refcounts.any()
    assert np.all(cache.table.pages == 128)
    assert not cache.stats.counters.any()
    jaxkv.check_invariants(cache)


def test_a_cache_can_be_made_inside_jit_and_donated():
    cache = jax.jit(lambda: jaxkv.init(CacheConfig(**SIZES)))()
    same = jax.jit(lambda cache: cache, donate_argnums=0)(cache)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    again = jax.jit(lambda cache: cache, donate_argnums=0)(jaxkv.init(same.config))
    jaxkv.check_invariants(again)


def test_a_cache_goes_through_tree_maps_and_keeps_its_config():
    cache = jaxkv.init(CacheConfig(**SIZES))
    shapes = jax.eval_shape(lambda cache: cache, cache)
    assert shapes.config == cache.config
    assert jax.tree.structure(cache) == jax.tree.structure(shapes)
    assert jax.tree.map(lambda leaf: None, cache).config == cache.config
    assert not any(isinstance(leaf, CacheConfig) for leaf in jax.tree.leaves(cache))


def test_init_takes_nothing_but_a_config():
    with pytest.raises((ValueError, TypeError), match="CacheConfig"):
        jaxkv.init({"num_layers": 2})


def test_status_values_are_fixed():
    assert {status.name: int(status) for status in jaxkv.Status} == {
        "OK": 0,
        "OUT_OF_PAGES": 1,
        "SEQUENCE_TOO_LONG": 2,
        "INVALID_SEQ": 3,
        "OCCUPIED": 4,
        "PADDING": 5,
        "INVALID_LENGTH": 6,
        "ROLLBACK_TOO_LONG": 7,
    }


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_four_bits_take_at_most_three_tenths_of_bfloat16(head_dim):
    sizes = dict(num_layers=2, num_kv_heads=3, head_dim=head_dim, num_pages=4)
    config = CacheConfig(**sizes, quantization="int4")
    pool = jaxkv.init(config).pool
    assert sum(array.nbytes for array in (pool.k, pool.v, pool.k_scale, pool.v_scale)) == config.pool_bytes
    assert config.pool_bytes <= 0.30 * CacheConfig(**sizes, dtype="bfloat16").pool_bytes


@pytest.mark.parametrize("head_dim", [4, 20, 520])
def test_four_bits_come_by_eights(head_dim):
    with pytest.raises(ValueError, match=f"head_dim={head_dim} must be a multiple of 8, at most 512"):
        CacheConfig(num_layers=1, num_kv_heads=1, head_dim=head_dim, num_pages=1, quantization="int4")
