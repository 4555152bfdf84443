"""A program that runs JAX with 64-bit types gets the same cache: every counter stays int32."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv


@pytest.mark.parametrize("page_size", [4, pytest.param(16, marks=pytest.mark.slow), 300])
def test_every_operation_keeps_its_dtypes_under_x64(page_size):
    config = jaxkv.CacheConfig(
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        num_pages=8,
        page_size=page_size,
        max_seqs=4,
        dtype="float32",
    )
    with jax.enable_x64(True):
        cache = jaxkv.init(config)
        before = jax.tree.map(lambda leaf: (leaf.dtype, leaf.shape), cache)
        seqs, ones = jnp.arange(2), jnp.ones(2, jnp.int64)
        assert seqs.dtype == jnp.int64
        cache, batch = jax.jit(jaxkv.allocate, static_argnames="total_tokens")(
            cache, seqs, 5 * ones, total_tokens=12
        )
        k = jnp.asarray(np.random.default_rng(0).normal(size=(12, 2, 8)), jnp.float32)
        cache = jax.jit(jaxkv.append, static_argnums=1)(cache, 1, batch, k, k)
        for layer in (1, jnp.asarray(1), jnp.asarray(1, jnp.int8)):
            out, lse = jaxkv.attend(cache, layer, batch, k, return_lse=True)
            assert out.dtype == lse.dtype == jnp.float32
        own = replace(batch, fingerprint=batch.status)
        assert batch.fingerprint.dtype == jnp.uint32
        assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype("int32")}
        cache, status = jax.jit(jaxkv.fork)(cache, seqs[:1], seqs[:1] + 2)
        assert status.dtype == jnp.int32
        cache, status = jax.jit(jaxkv.reorder)(cache, seqs, seqs[::-1])
        assert status.dtype == jnp.int32
        cache, _ = jax.jit(jaxkv.allocate)(cache, seqs + 1, ones)
        cache, status = jax.jit(jaxkv.truncate)(cache, seqs, 3 * ones)
        assert status.dtype == jnp.int32
        cache = jax.jit(jaxkv.free)(cache, seqs[:1])
        cache, num_moved = jax.jit(jaxkv.compact)(cache)
        assert num_moved.dtype == jnp.int32
        cache = jax.jit(jaxkv.maybe_compact)(cache)
        profile = jax.jit(jaxkv.memory_profile)(cache)
        assert {leaf.dtype for leaf in jax.tree.leaves(profile)} == {jnp.dtype("int32")}
        assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.shape), cache) == before
        jaxkv.check_invariants(cache)


def test_a_number_beyond_int32_names_no_slot_and_no_length():
    config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=8, max_seqs=4)
    cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([1]))
    with jax.enable_x64(True):
        _, batch = jaxkv.allocate(cache, jnp.array([2**32, 1]), jnp.array([3, 2**32 + 3]), total_tokens=8)
        assert batch.status.tolist() == [jaxkv.Status.INVALID_SEQ, jaxkv.Status.INVALID_LENGTH]
        assert int(jaxkv.free(cache, jnp.array([2**32])).table.lengths[0]) == 1


def test_numpy_and_lists_serve_outside_jit(no_shape_checks):
    config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=8, max_seqs=4)
    cache, batch = jaxkv.allocate(jaxkv.init(config), [2, 2**32 + 1], np.array([1, 1]))
    assert batch.status.tolist() == [jaxkv.Status.OK, jaxkv.Status.INVALID_SEQ]
    ones = np.ones((2, 1, 8), np.float32)
    cache = jaxkv.append(cache, 0, batch, ones, ones)
    assert jaxkv.attend(cache, 0, batch, ones)[:, 0, 0].tolist() == [1, 0]
