"""Small configs, and caches filled with random tokens."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv import CacheConfig
from jaxkv.testing import poison_free_pages
from tests import jitted

SMALL = CacheConfig(
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    num_pages=8,
    page_size=4,
    max_seqs=4,
    max_pages_per_seq=4,
    dtype="float32",
)
PAGE_OF_ONE = replace(SMALL, page_size=1, max_pages_per_seq=None)  # rows as wide as the pool
ONE_SEQUENCE = replace(SMALL, max_seqs=1, num_pages=3, max_pages_per_seq=3)


def ints(*values):
    return jnp.array(values, jnp.int32)


def normal(*shape, dtype="float32", seed=0):
    """NumPy draws them: JAX would compile a program for every shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype)))


def tokens(config, count, seed=0):
    shape = (count, config.num_kv_heads, config.head_dim)
    return normal(*shape, dtype=config.dtype, seed=seed), normal(*shape, dtype=config.dtype, seed=seed + 1)


def filled(config, lengths, seed=0, policy=None):
    """A cache whose sequences hold random tokens in every layer, and the (k, v) written to each layer."""
    total = sum(lengths)
    slots = ints(*range(len(lengths)))
    cache, batch = jitted.allocate(poisoned_init(config, policy), slots, ints(*lengths), total_tokens=total)
    written = [tokens(config, total, seed + 10 * layer) for layer in range(config.num_layers)]
    for layer, (k, v) in enumerate(written):
        cache = jitted.append(cache, layer, batch, k, v)
    return cache, written


@partial(jax.jit, static_argnums=(0, 1))
def poisoned_init(config, policy=None):
    """An empty cache whose pool holds NaN instead of zeros."""
    cache = jaxkv.init(config, policy)
    return poison_free_pages(cache)
