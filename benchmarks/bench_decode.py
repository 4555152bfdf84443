"""Decode speed of SmolLM2-135M: the paged cache against a hand-written dense one, and `transformers`.

The same weights, the same model code, float32, greedy; each round decodes `STEPS` tokens in one compiled
loop, and the contenders take turns. Lengths are set back between rounds, outside the clock. Pages of the
sequences are interleaved in the pool, as they are after a while of serving.

Bars: at least 0.95 of the dense cache's tokens/s at context 512 (one sequence and eight), at least 1.3 of
it for eight ragged sequences up to 4,096 tokens, at least level with `transformers` for one sequence.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks import dense_cache
from benchmarks.timing import Contender, race, report
from jaxkv.models import Llama, ModelConfig, load

STEPS = 32


def paged(model: Llama, config: ModelConfig, lengths: np.ndarray, max_tokens: int) -> Contender:
    """The paged cache, its pool no larger than the sequences need."""
    num_seqs = len(lengths)
    cache_config = config.cache_config(
        num_pages=int(sum(-(-(int(n) + STEPS) // 16) for n in lengths)),
        max_seqs=num_seqs,
        max_pages_per_seq=-(-max_tokens // 16),
        dtype="float32",
    )
    seqs, begin = jnp.arange(num_seqs, dtype=jnp.int32), jnp.asarray(lengths, jnp.int32)
    state = [_interleaved(cache_config, seqs, begin), jnp.zeros(num_seqs, jnp.int32)]

    @partial(jax.jit, donate_argnums=1)
    def run(model, cache, tokens):
        def step(_, carry):
            cache, tokens = carry
            cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
            logits, cache = model(tokens, cache, batch)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, STEPS, step, (cache, tokens))

    rewind = jax.jit(jaxkv.truncate, donate_argnums=0)

    def reset():
        state[0] = jax.block_until_ready(rewind(state[0], seqs, begin))

    def decode():
        state[:] = jax.block_until_ready(run(model, *state))

    return Contender("jaxkv, paged", decode, reset)


def _interleaved(config: jaxkv.CacheConfig, seqs, lengths) -> jaxkv.KVCache:
    """A cache whose sequences took their pages in turn, with random K and V in the whole pool."""
    grow = jax.jit(jaxkv.allocate, static_argnames="total_tokens", donate_argnums=0)
    cache = jaxkv.init(config)
    for start in range(0, config.max_tokens_per_seq, config.page_size):
        more = jnp.clip(lengths - start, 0, config.page_size)
        cache, _ = grow(cache, seqs, more, total_tokens=config.page_size * len(seqs))
    k, v = (jax.random.normal(jax.random.key(i), config.pool_shape) for i in range(2))
    return jaxkv.KVCache(jaxkv.KVPool(k, v), cache.table, cache.stats, config)


def dense(model: Llama, config: ModelConfig, lengths: np.ndarray, max_tokens: int) -> Contender:
    """The dense static cache."""
    begin = jnp.asarray(lengths, jnp.int32)
    cache = dense_cache.init(config, len(lengths), max_tokens)
    draw = lambda i: tuple(jax.random.normal(jax.random.key(i), k.shape) for k in cache.k)  # noqa: E731
    state = [dense_cache.DenseCache(draw(0), draw(1), begin + 0), jnp.zeros(len(lengths), jnp.int32)]

    @partial(jax.jit, donate_argnums=1)
    def run(model, cache, tokens):
        def step(_, carry):
            cache, tokens = carry
            logits, cache = dense_cache.decode_step(model, cache, tokens)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, STEPS, step, (cache, tokens))

    def reset():
        state[0] = dense_cache.DenseCache(state[0].k, state[0].v, begin + 0)

    def decode():
        state[:] = jax.block_until_ready(run(model, *state))

    return Contender("dense static cache", decode, reset)


if __name__ == "__main__":
    raise SystemExit(main())
