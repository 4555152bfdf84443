"""A decoder in Equinox: the cache is a field of the module, or an argument."""

import equinox as eqx
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


class Decoder(eqx.Module):
    """Has the signature of `jaxkv.CausalLM`: `generate`, `beam_search`, `serve` take it."""

    embed: jax.Array
    positions: jax.Array
    qkv: list[eqx.nn.Linear]
    out: list[eqx.nn.Linear]

    def __init__(self, key):
        keys = iter(jax.random.split(key, 2 + 2 * CONFIG.num_layers))
        size = (HEADS + 2 * CONFIG.num_kv_heads) * CONFIG.head_dim
        self.embed = 0.1 * jax.random.normal(next(keys), (VOCAB, WIDTH))
        self.positions = 0.1 * jax.random.normal(next(keys), (128, WIDTH))
        self.qkv = [
            eqx.nn.Linear(WIDTH, size, key=next(keys))
            for _ in range(CONFIG.num_layers)
        ]
        self.out = [
            eqx.nn.Linear(HEADS * CONFIG.head_dim, WIDTH, key=next(keys))
            for _ in range(CONFIG.num_layers)
        ]

    def __call__(self, tokens, cache, batch, *, rows=None):
        x = self.embed[tokens] + self.positions[batch.positions]
        for layer, (qkv, out) in enumerate(zip(self.qkv, self.out)):
            heads = jax.vmap(qkv)(x).reshape(len(x), -1, CONFIG.head_dim)
            q, k, v = jnp.split(
                heads, [HEADS, HEADS + CONFIG.num_kv_heads], axis=1
            )
            cache = jaxkv.append(cache, layer, batch, k, v)
            x = x + jax.vmap(out)(
                jaxkv.attend(cache, layer, batch, q).reshape(len(x), -1)
            )
        return (x if rows is None else x[rows]) @ self.embed.T, cache


@eqx.filter_jit(donate="all-except-first")
def step(model, cache, seqs, tokens, num_tokens):
    cache, batch = jaxkv.allocate(
        cache, seqs, num_tokens, total_tokens=tokens.shape[0]
    )
    logits, cache = model(tokens, cache, batch, rows=batch.last_rows)
    return cache, jnp.argmax(logits, axis=-1), batch.status


model = Decoder(jax.random.key(0))
tokens, lengths = jaxkv.pack([[1, 2, 3], [4, 5]])
cache, tokens, status = step(
    model, jaxkv.init(CONFIG), jnp.array([0, 1]), tokens, lengths
)
for _ in range(7):
    # Everything but the model is donated, so the slots are made anew.
    cache, tokens, status = step(
        model, cache, jnp.array([0, 1]), tokens, jnp.array([1, 1])
    )
print(tokens)
# --8<-- [end:model]

result = jaxkv.generate(model, [[1, 2, 3], [4, 5]], CONFIG, max_new_tokens=8)
assert [samples[0][-1] for samples in result.tokens] == tokens.tolist()
