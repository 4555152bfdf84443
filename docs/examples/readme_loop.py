import jax, jax.numpy as jnp, jaxkv

sizes = dict(num_layers=4, num_kv_heads=2, head_dim=32, dtype="float32")
config = jaxkv.CacheConfig(num_pages=64, max_seqs=4, **sizes)
shapes = dict(embed=(1000, 256), position=(2048, 256), qkv=(4, 256, 12 * 32))  # heads: 8 of q, 2 of k, 2 of v
weights = {name: 0.1 * jax.random.normal(jax.random.key(0), shape) for name, shape in shapes.items()}


@jax.jit(donate_argnames="cache")
def step(weights, cache, seqs, tokens, num_tokens):
    cache, batch = jaxkv.allocate(cache, seqs, num_tokens, total_tokens=tokens.shape[0])
    x = weights["embed"][tokens] + weights["position"][batch.positions]
    for layer in range(4):  # or lax.scan
        q, k, v = jnp.split((x @ weights["qkv"][layer]).reshape(-1, 12, 32), [8, 10], axis=1)
        cache = jaxkv.append(cache, layer, batch, k, v)
        x = x + jaxkv.attend(cache, layer, batch, q).reshape(x.shape)
    return cache, jnp.argmax(x[batch.last_rows] @ weights["embed"].T, axis=-1), batch.status


seqs, (prompts, lengths) = jnp.array([0, 1]), jaxkv.pack([[11, 12, 13], [21, 22]])
cache, tokens, status = step(weights, jaxkv.init(config), seqs, prompts, lengths)  # prefill, ragged
for _ in range(20):
    cache, tokens, status = step(weights, cache, seqs, tokens, jnp.ones_like(seqs))  # decode
jaxkv.raise_for_status(status)
print(tokens, "free pages:", cache.table.num_free)
