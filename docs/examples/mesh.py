"""A mesh of four devices: K and V divided by head, or a cache for each device."""

import os

# --8<-- [start:devices]
# Four devices on a machine that has one; leave this out where there are four.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
# --8<-- [end:devices]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv

config = jaxkv.CacheConfig(
    num_layers=2,
    num_kv_heads=4,
    head_dim=16,
    num_pages=32,
    page_size=4,
    max_seqs=4,
    dtype="float32",
)
seqs, x = jnp.arange(4), jax.random.normal(jax.random.key(0), (4, 8, 16))


def step(cache, seqs, x):
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    for layer in range(config.num_layers):
        cache = jaxkv.append(cache, layer, batch, x[:, :4], x[:, 4:])
        x = x + jaxkv.attend(cache, layer, batch, x)
    return cache, x


_, alone = jax.jit(step)(jaxkv.init(config), seqs, x)

# --8<-- [start:heads]
# Tensor parallelism: K, V and queries divided by head; each device has the page table.
mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
cache = jaxkv.init(config)
pool = jax.device_put(cache.pool, NamedSharding(mesh, P(None, None, "model")))
cache = replace(jax.device_put(cache, NamedSharding(mesh, P())), pool=pool)
by_head = jax.device_put(x, NamedSharding(mesh, P(None, "model")))
with jax.set_mesh(mesh):
    cache, out = jax.jit(step, donate_argnums=0)(
        cache, jax.device_put(seqs, NamedSharding(mesh, P())), by_head
    )
print(out.sharding.spec, cache.pool.k.sharding.spec)
# --8<-- [end:heads]
np.testing.assert_allclose(out, alone, rtol=1e-5, atol=1e-5)

# --8<-- [start:replicas]
# Data parallelism: each device has its own cache; outside, they have a leading axis.
mesh = jax.make_mesh((4,), ("data",))
caches = jax.tree.map(
    lambda array: jnp.stack([array] * 4), jaxkv.init(config)
)
caches, inputs = jax.device_put(
    (caches, jnp.stack([x] * 4)), NamedSharding(mesh, P("data"))
)


@partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
def on_each(caches, inputs):
    cache, x = jax.tree.map(lambda array: array[0], (caches, inputs))
    results = step(cache, jnp.arange(4), x)
    return jax.tree.map(lambda array: array[None], results)


caches, outs = jax.jit(on_each, donate_argnums=0)(caches, inputs)
print(outs.shape, caches.table.num_free)
# --8<-- [end:replicas]
for one in outs:
    np.testing.assert_allclose(one, alone, rtol=1e-5, atol=1e-5)
