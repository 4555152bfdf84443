"""Layers with a sliding window release the pages that no token will attend to again."""

from functools import partial

import jax
import jax.numpy as jnp

import jaxkv

# --8<-- [start:config]
# Six layers: five with a window of 64 tokens, one with none, as in Gemma 3.
WINDOWS = (64, 64, 64, 64, 64, None)
config = jaxkv.CacheConfig(
    num_layers=6,
    num_kv_heads=1,
    head_dim=16,
    layer_windows=WINDOWS,
    max_chunk=128,  # most tokens of one sequence in one allocate
    num_pages=256,
    page_size=16,
    max_seqs=2,
    max_pages_per_seq=64,
    dtype="float32",
)
print(config.groups)  # layers of a kind that share a row of the page table
# --8<-- [end:config]

# --8<-- [start:loop]


@partial(jax.jit, donate_argnames="cache")
def step(cache, seqs, x, num_tokens):
    cache, batch = jaxkv.allocate(
        cache, seqs, num_tokens, total_tokens=x.shape[0]
    )
    for layer in range(config.num_layers):
        cache = jaxkv.append(cache, layer, batch, x, x)
        x = x + jaxkv.attend(
            cache, layer, batch, x
        )  # the layer's own window, by default
    return cache, x, batch.status


cache, seqs = jaxkv.init(config), jnp.array([0])
x = jax.random.normal(jax.random.key(0), (8, 128, 1, config.head_dim))
for chunk in x:  # a prompt of 1,024 tokens, in chunks
    cache, out, status = step(cache, seqs, chunk, jnp.array([128]))
    used = config.num_pages - cache.table.num_free
    print(f"{cache.table.positions[0]:>5} tokens: {used:>3} pages")
jaxkv.raise_for_status(status)
# --8<-- [end:loop]

every_token = (
    1024 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
)  # bytes
print(
    f"{int(used) * config.page_bytes / every_token:.0%} of what keeping every token takes"
)
assert int(used) * config.page_bytes < 0.5 * every_token
