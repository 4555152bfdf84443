"""`jax.lax.scan` over layers: the cache is the carry, the layer a traced number."""

from functools import partial

import jax
import jax.numpy as jnp

import jaxkv
import jaxkv.testing

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 24, 4, 2, 16, 64
CONFIG = jaxkv.CacheConfig(
    num_layers=LAYERS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    num_pages=256,
    max_seqs=4,
    dtype="float32",
)
keys = jax.random.split(jax.random.key(0), 2)
weights = {
    "qkv": 0.1
    * jax.random.normal(
        keys[0], (LAYERS, WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    ),
    "out": 0.1
    * jax.random.normal(keys[1], (LAYERS, HEADS * HEAD_DIM, WIDTH)),
}

# --8<-- [start:scan]


def forward(weights, cache, batch, x):
    def layer(carry, inputs):
        cache, x = carry
        number, weights = inputs
        heads = (x @ weights["qkv"]).reshape(len(x), -1, HEAD_DIM)
        q, k, v = jnp.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)
        cache = jaxkv.append(cache, number, batch, k, v)
        x = (
            x
            + jaxkv.attend(cache, number, batch, q).reshape(len(x), -1)
            @ weights["out"]
        )
        return (cache, x), None

    numbers = jnp.arange(LAYERS, dtype=jnp.int32)
    (cache, x), _ = jax.lax.scan(layer, (cache, x), (numbers, weights))
    return cache, x


@partial(jax.jit, donate_argnames="cache")
def step(weights, cache, seqs, x):
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    return forward(weights, cache, batch, x)


seqs, x = jnp.array([0, 1]), jnp.ones((2, WIDTH))
cache, out = step(weights, jaxkv.init(CONFIG), seqs, x)
# --8<-- [end:scan]
print(out.shape, jaxkv.lengths(cache))

# --8<-- [start:in_place]
# The pool is one array for all layers. As a carry it is updated in place; as `xs` and
# `ys` of the scan it would be copied in every step.
shapes = jax.eval_shape(lambda: (weights, jaxkv.init(CONFIG), seqs, x))
jaxkv.testing.assert_in_place(step, *shapes, donate_argnums=1)
# --8<-- [end:in_place]
