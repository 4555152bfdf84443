"""K and V in eight or four bits."""

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv.models import ModelConfig, random_model

# --8<-- [start:formats]
sizes = dict(
    num_layers=32, num_kv_heads=8, head_dim=128, num_pages=1024, page_size=16
)
for options in (
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    *({"quantization": q} for q in ("int8", "fp8", "int4")),
):
    config = jaxkv.CacheConfig(**sizes, **options)
    print(options, config.estimated_memory())
# --8<-- [end:formats]

# --8<-- [start:error]
key = jax.random.key(0)
k, v, q = (
    jax.random.normal(key, (48, heads, 64))
    for key, heads in zip(jax.random.split(key, 3), (2, 2, 4))
)


def attended(**options):
    config = jaxkv.CacheConfig(
        num_layers=1, num_kv_heads=2, head_dim=64, num_pages=4, **options
    )
    cache, batch = jaxkv.allocate(
        jaxkv.init(config), jnp.array([0]), jnp.array([48]), total_tokens=48
    )
    return jaxkv.attend(jaxkv.append(cache, 0, batch, k, v), 0, batch, q)


exact = attended(dtype="float32")
for name in ("int8", "fp8", "int4"):
    error = (
        jnp.abs(attended(quantization=name) - exact).max()
        / jnp.abs(exact).max()
    )
    print(f"{name}: {error:.1%}")
    assert error < 0.25
# --8<-- [end:error]

# --8<-- [start:generate]
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=64,
    max_context=256,
)
model = random_model(MODEL, jax.random.key(0))
config = model.cache_config(num_pages=16, max_seqs=2, quantization="int8")
print(jaxkv.generate(model, [[1, 2, 3]], config, max_new_tokens=8).tokens)
# --8<-- [end:generate]
