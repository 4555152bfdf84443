"""A decoder in Flax NNX. The cache is an argument, or a variable of the module."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import jaxkv

CONFIG = jaxkv.CacheConfig(
    num_layers=2,
    num_kv_heads=2,
    head_dim=16,
    num_pages=32,
    max_seqs=4,
    dtype="float32",
)

# --8<-- [start:model]


class Attention(nnx.Module):
    def __init__(self, layer, width, heads, rngs):
        self.layer, self.split = layer, [heads, heads + CONFIG.num_kv_heads]
        size = (heads + 2 * CONFIG.num_kv_heads) * CONFIG.head_dim
        self.qkv = nnx.Linear(width, size, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(
            heads * CONFIG.head_dim, width, use_bias=False, rngs=rngs
        )

    def __call__(self, x, cache, batch):
        heads = self.qkv(x).reshape(len(x), -1, CONFIG.head_dim)
        q, k, v = jnp.split(heads, self.split, axis=1)
        cache = jaxkv.append(cache, self.layer, batch, k, v)
        attended = jaxkv.attend(cache, self.layer, batch, q)
        return self.out(attended.reshape(len(x), -1)), cache


class Decoder(nnx.Module):
    """Has the signature of `jaxkv.CausalLM`: `generate`, `beam_search`, `serve` take it."""

    def __init__(self, vocab, width, heads, rngs):
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.positions = nnx.Embed(128, width, rngs=rngs)
        blocks = [
            Attention(n, width, heads, rngs) for n in range(CONFIG.num_layers)
        ]
        self.blocks = nnx.List(blocks)

    def __call__(self, tokens, cache, batch, *, rows=None):
        x = self.embed(tokens) + self.positions(batch.positions)
        for block in self.blocks:
            y, cache = block(x, cache, batch)
            x = x + y
        return self.embed.attend(x if rows is None else x[rows]), cache


model = Decoder(vocab=256, width=64, heads=4, rngs=nnx.Rngs(0))
result = jaxkv.generate(model, [[1, 2, 3], [4, 5]], CONFIG, max_new_tokens=8)
print(result.tokens)
# --8<-- [end:model]
# --8<-- [start:variable]


class Chat(nnx.Module):
    """Holds its cache: a step needs no other argument than the tokens."""

    def __init__(self, decoder):
        self.decoder = decoder
        self.kv = nnx.Cache(jaxkv.init(CONFIG))

    def __call__(self, seqs, tokens, num_tokens):
        total = tokens.shape[0]
        cache, batch = jaxkv.allocate(
            self.kv.get_value(), seqs, num_tokens, total_tokens=total
        )
        logits, cache = self.decoder(
            tokens, cache, batch, rows=batch.last_rows
        )
        self.kv.set_value(cache)
        return jnp.argmax(logits, axis=-1), batch.status


# The state is donated, so the cache inside it is updated in place.
graph, state = nnx.split(Chat(model))


@partial(jax.jit, donate_argnames="state")
def step(state, seqs, tokens, num_tokens):
    chat = nnx.merge(graph, state)
    results = chat(seqs, tokens, num_tokens)
    return nnx.state(chat), results


seqs = jnp.array([0, 1])
tokens, num_tokens = jaxkv.pack([[1, 2, 3], [4, 5]])
texts = []
for _ in range(8):
    state, (tokens, status) = step(state, seqs, tokens, num_tokens)
    texts.append(tokens)
    num_tokens = jnp.ones_like(seqs)
# --8<-- [end:variable]

assert [samples[0] for samples in result.tokens] == jnp.stack(
    texts, axis=1
).tolist()
