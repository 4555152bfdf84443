"""What the cache holds: a profile inside `jit`, metrics, pictures."""

import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv.memory import page_map, plot_pages
from jaxkv.telemetry import Telemetry

config = jaxkv.CacheConfig(
    num_layers=2,
    num_kv_heads=2,
    head_dim=16,
    num_pages=32,
    page_size=4,
    max_seqs=4,
)

# --8<-- [start:profile]


@partial(jax.jit, donate_argnames="cache")
def step(cache, seqs, num_tokens):
    cache, batch = jaxkv.allocate(cache, seqs, num_tokens, total_tokens=16)
    return cache, jaxkv.memory_profile(
        cache
    )  # arrays: it can be summed, stacked by a scan, logged later


cache, profile = step(
    jaxkv.init(config), jnp.array([0, 1]), jnp.array([9, 3])
)
cache, status = jaxkv.fork(cache, jnp.array([0]), jnp.array([2]))
print(jaxkv.memory_profile(cache).report())
print(cache.stats)
# --8<-- [end:profile]

# --8<-- [start:pictures]
print(page_map(cache).text())  # a character for each page
with tempfile.TemporaryDirectory() as folder:
    plot_pages(cache).savefig(Path(folder) / "pages.png")  # needs jaxkv[plot]
# --8<-- [end:pictures]

# --8<-- [start:metrics]
# `observe` does not wait for the device: a profile is published once it has arrived.
used = []
telemetry = Telemetry(
    every=2,
    on_profile=lambda name, profile: used.append(int(profile.physical_pages)),
)
with telemetry.serve(
    port=0
):  # Prometheus reads http://127.0.0.1:port/metrics
    for _ in range(6):
        cache, profile = step(cache, jnp.array([0, 1]), jnp.array([1, 1]))
        telemetry.observe(cache)
    telemetry.flush()
print("pages in use:", used)
# --8<-- [end:metrics]
assert len(used) == 3
