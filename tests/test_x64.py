"""A program that runs JAX with 64-bit types gets the same cache: every counter stays int32."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv


def test_every_operation_keeps_its_dtypes_under_x64():
    config = jaxkv.CacheConfig(
        num_layers=2, num_kv_heads=2, head_dim=8, num_pages=8, page_size=4, max_seqs=4, dtype="float32"
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
        out, lse = jaxkv.attend(cache, jnp.asarray(1), batch, k, return_lse=True)
        assert out.dtype == lse.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(batch)} == {jnp.dtype("int32")}
        cache, status = jax.jit(jaxkv.fork)(cache, seqs[:1], seqs[:1] + 2)
        assert status.dtype == jnp.int32
        cache, _ = jax.jit(jaxkv.allocate)(cache, seqs + 1, ones)
        cache = jax.jit(jaxkv.truncate)(cache, seqs, 3 * ones)
        cache = jax.jit(jaxkv.free)(cache, seqs[:1])
        cache, num_moved = jax.jit(jaxkv.compact)(cache)
        assert num_moved.dtype == jnp.int32
        assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.shape), cache) == before
        jaxkv.check_invariants(cache)
