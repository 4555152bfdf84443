"""A decoder in Flax Linen, with the cache in a variable collection."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxkv

CONFIG = jaxkv.CacheConfig(
    num_layers=2,
    num_kv_heads=2,
    head_dim=16,
    num_pages=32,
    max_seqs=4,
    dtype="float32",
)
HEADS, WIDTH, VOCAB = 4, 64, 256

# --8<-- [start:model]


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, seqs, tokens, num_tokens):
        state = self.variable("cache", "kv", jaxkv.init, CONFIG)
        cache, batch = jaxkv.allocate(
            state.value, seqs, num_tokens, total_tokens=tokens.shape[0]
        )
        embed = nn.Embed(VOCAB, WIDTH)
        x = embed(tokens) + nn.Embed(128, WIDTH, name="positions")(
            batch.positions
        )
        for layer in range(CONFIG.num_layers):
            qkv = nn.Dense(
                (HEADS + 2 * CONFIG.num_kv_heads) * CONFIG.head_dim,
                name=f"qkv_{layer}",
            )(x)
            qkv = qkv.reshape(len(x), -1, CONFIG.head_dim)
            q, k, v = jnp.split(
                qkv, [HEADS, HEADS + CONFIG.num_kv_heads], axis=1
            )
            cache = jaxkv.append(cache, layer, batch, k, v)
            attended = jaxkv.attend(cache, layer, batch, q).reshape(
                len(x), -1
            )
            x = x + nn.Dense(WIDTH, name=f"out_{layer}")(attended)
        if (
            not self.is_initializing()
        ):  # `init` traces a call too, which is no step
            state.value = cache
        return jnp.argmax(
            embed.attend(x[batch.last_rows]), axis=-1
        ), batch.status


model, seqs = Decoder(), jnp.array([0, 1])
prompts, lengths = jaxkv.pack([[1, 2, 3], [4, 5]])
variables = jax.jit(model.init)(jax.random.key(0), seqs, prompts, lengths)
params, state = variables["params"], {"cache": variables["cache"]}


@partial(jax.jit, donate_argnames="state")
def step(params, state, seqs, tokens, num_tokens):
    return model.apply(
        {"params": params, **state},
        seqs,
        tokens,
        num_tokens,
        mutable=["cache"],
    )


(tokens, status), state = step(params, state, seqs, prompts, lengths)
for _ in range(8):
    (tokens, status), state = step(
        params, state, seqs, tokens, jnp.ones_like(seqs)
    )
jaxkv.raise_for_status(status)
print(tokens, jaxkv.lengths(state["cache"]["kv"])[:2])
# --8<-- [end:model]

assert jaxkv.lengths(state["cache"]["kv"])[:2].tolist() == [11, 10]
