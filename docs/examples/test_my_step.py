"""Tests of your own code, with `jaxkv.testing`."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jaxkv
import jaxkv.testing

# --8<-- [start:tests]
CONFIG = jaxkv.CacheConfig(
    num_layers=2,
    num_kv_heads=2,
    head_dim=64,
    num_pages=64,
    max_seqs=4,
    dtype="float32",
)


@partial(jax.jit, donate_argnames="cache")
def step(cache, seqs, x):
    """The code under test."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    for layer in range(CONFIG.num_layers):
        cache = jaxkv.append(cache, layer, batch, x, x)
        x = x + jaxkv.attend(cache, layer, batch, x)
    return cache, x, batch.status


def test_every_page_is_accounted_for():
    cache, seqs = jaxkv.init(CONFIG), jnp.array([0, 3])
    for _ in range(40):
        cache, x, status = step(cache, seqs, jnp.ones((2, 2, 64)))
        jaxkv.raise_for_status(status)
        jaxkv.check_invariants(cache)
        cache = jaxkv.testing.poison_free_pages(cache)
        assert jnp.all(jnp.isfinite(x))
    assert jaxkv.lengths(cache).tolist() == [40, 0, 0, 40]


def test_a_step_updates_the_pool_in_place():
    cache = jax.eval_shape(
        lambda: jaxkv.init(CONFIG)
    )  # shapes only: nothing is allocated
    jaxkv.testing.assert_in_place(
        step, cache, jnp.array([0, 3]), jnp.ones((2, 2, 64))
    )


def test_one_after_the_other_is_as_together():
    x = jnp.ones((2, 2, 64))
    together, *_ = step(jaxkv.init(CONFIG), jnp.array([0, 3]), x)
    first, *_ = step(jaxkv.init(CONFIG), jnp.array([3]), x[:1])
    second, *_ = step(first, jnp.array([0]), x[:1])
    jaxkv.testing.assert_caches_equivalent(together, second)


def test_a_full_pool_is_an_error_that_names_the_sequence():
    seqs, counts = (
        jnp.array([0, 3]),
        jnp.array([600, 600]),
    )  # of 1,024 token slots
    _, batch = jaxkv.allocate(
        jaxkv.init(CONFIG), seqs, counts, total_tokens=1200
    )
    with pytest.raises(jaxkv.OutOfPagesError, match="slot 3"):
        jaxkv.raise_for_status(batch)


# --8<-- [end:tests]
