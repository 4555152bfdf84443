"""Programs that are wrong on purpose: the check must catch every one."""

from dataclasses import replace

import jax
import jax.numpy as jnp

import jaxkv
from tests.compiled.in_place.program import MAX_SEQS, Program, int32, one_token


def compact_by_cond(cache):
    """Each branch of a `cond` has a pool of its own."""
    return jax.lax.cond(jaxkv.should_compact(cache), lambda c: jaxkv.compact(c)[0], lambda c: c, cache)


def layer_sliced_out(cache, seqs, k):
    """Each layer leaves the pool, is written to, and is put back."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    for layer in range(cache.config.num_layers):
        own = jax.lax.optimization_barrier(cache.pool.k[layer])
        own = own.at[batch.page_ids, :, batch.offsets].set(k.astype(own.dtype), mode="drop")
        cache = replace(cache, pool=replace(cache.pool, k=cache.pool.k.at[layer].set(own)))
    return cache


def pool_through_scan(cache, seqs, k):
    """The pool is the input and the output of a scan over layers."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))

    def write(_, own):
        new, _ = cache.config.storage.encode(k, keys=True)
        return None, own.at[batch.page_ids, :, batch.offsets].set(new, mode="drop")

    _, pages = jax.lax.scan(write, None, cache.pool.k)
    return replace(cache, pool=replace(cache.pool, k=pages))


def wrong_programs() -> list[Program]:
    """All of them."""
    seqs, (k, _) = int32(MAX_SEQS), one_token()
    return [
        Program("a layer sliced out and put back", layer_sliced_out, lambda: (seqs, k)),
        Program("a layer of codes sliced out", layer_sliced_out, lambda: (seqs, k), quantization="int8"),
        Program("the pool through a scan", pool_through_scan, lambda: (seqs, k)),
        Program("compact inside a cond", compact_by_cond, lambda: ()),
        Program("nothing donated", jaxkv.allocate, lambda: (seqs, seqs), donated=False),
    ]
