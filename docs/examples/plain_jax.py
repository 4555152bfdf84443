"""A decoder in plain JAX: functions and a dictionary of weights."""

from functools import partial

import jax
import jax.numpy as jnp

import jaxkv

LAYERS, VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 4, 256, 64, 4, 2, 16
ROPE = jaxkv.Rope.of(head_dim=HEAD_DIM, theta=10_000.0)

# --8<-- [start:model]


def init_weights(key):
    sizes = {
        "embed": (VOCAB, WIDTH),
        "qkv": (LAYERS, WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
        "out": (LAYERS, HEADS * HEAD_DIM, WIDTH),
        "up": (LAYERS, WIDTH, 2 * WIDTH),
        "down": (LAYERS, 2 * WIDTH, WIDTH),
    }
    keys = jax.random.split(key, len(sizes))
    return {
        name: 0.1 * jax.random.normal(k, size)
        for k, (name, size) in zip(keys, sizes.items())
    }


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def forward(weights, cache, batch, tokens):
    """Logits of the last token of every sequence, and the cache."""
    x = weights["embed"][tokens]
    for layer in range(LAYERS):
        heads = (norm(x) @ weights["qkv"][layer]).reshape(
            len(x), -1, HEAD_DIM
        )
        q, k, v = jnp.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)
        # Rotated before they are stored.
        q, k = (ROPE.rotate(part, batch.positions) for part in (q, k))
        cache = jaxkv.append(cache, layer, batch, k, v)
        attended = jaxkv.attend(cache, layer, batch, q).reshape(len(x), -1)
        x = x + attended @ weights["out"][layer]
        x = (
            x
            + jax.nn.silu(norm(x) @ weights["up"][layer])
            @ weights["down"][layer]
        )
    return norm(x)[batch.last_rows] @ weights["embed"].T, cache


# --8<-- [end:model]
# --8<-- [start:loop]


@partial(jax.jit, donate_argnames="cache")
def prefill(weights, cache, seqs, tokens, lengths):
    cache, batch = jaxkv.allocate(
        cache, seqs, lengths, total_tokens=tokens.shape[0]
    )
    logits, cache = forward(weights, cache, batch, tokens)
    return cache, jnp.argmax(logits, axis=-1), batch.status


@partial(jax.jit, donate_argnames="cache", static_argnames="steps")
def decode(weights, cache, seqs, tokens, steps):
    """All steps in one compiled loop; the cache is updated in place."""

    def step(carry, _):
        cache, tokens = carry
        cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
        logits, cache = forward(weights, cache, batch, tokens)
        tokens = jnp.argmax(logits, axis=-1)
        return (cache, tokens), (tokens, batch.status)

    (cache, _), (tokens, status) = jax.lax.scan(
        step, (cache, tokens), length=steps
    )
    return cache, tokens, status


config = jaxkv.CacheConfig(
    num_layers=LAYERS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    dtype="float32",
    num_pages=64,
    page_size=16,
    max_seqs=4,
)
weights = init_weights(jax.random.key(0))
seqs = jnp.array([0, 1])
prompts, lengths = jaxkv.pack(
    [[11, 12, 13, 14], [21, 22]]
)  # ragged, without padding between them

cache, first, status = prefill(
    weights, jaxkv.init(config), seqs, prompts, lengths
)
cache, tokens, statuses = decode(weights, cache, seqs, first, steps=20)
jaxkv.raise_for_status(status)
jaxkv.raise_for_status(statuses)  # those of all steps
print(tokens.T)
print(
    "token slots in use:",
    jaxkv.lengths(cache)[:2],
    "free pages:",
    cache.table.num_free,
)
cache = jaxkv.free(cache, seqs)
# --8<-- [end:loop]

assert tokens.shape == (20, 2)
assert int(cache.table.num_free) == config.num_pages
