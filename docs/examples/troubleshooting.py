"""What to look at when a step is refused, is NaN, or is slow."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

import jaxkv
import jaxkv.testing

config = jaxkv.CacheConfig(
    num_layers=1,
    num_kv_heads=8,
    head_dim=128,
    dtype="float32",
    num_pages=4,
    page_size=16,
    max_seqs=4,
)


@partial(jax.jit, donate_argnames="cache", static_argnames="total_tokens")
def step(cache, seqs, num_tokens, *, total_tokens):
    cache, batch = jaxkv.allocate(
        cache, seqs, num_tokens, total_tokens=total_tokens
    )
    x = jnp.ones((total_tokens, 8, 128))
    cache = jaxkv.append(cache, 0, batch, x, x)
    return cache, jaxkv.attend(cache, 0, batch, x), batch


# --8<-- [start:refused]
seqs, num_tokens = jnp.array([0, 1, 2, 9]), jnp.array([20, 24, 12, 1])
cache, out, batch = step(
    jaxkv.init(config), seqs, num_tokens, total_tokens=60
)
print([jaxkv.Status(status).name for status in batch.status.tolist()])
try:
    jaxkv.raise_for_status(batch)
except jaxkv.OutOfPagesError as error:
    print(error)
print(jaxkv.memory_profile(cache).report())

# Entries that were refused are unchanged: make room, and ask again for these.
cache = jaxkv.free(cache, jnp.array([0]))
again = jnp.where(batch.status == jaxkv.Status.OUT_OF_PAGES, seqs, -1)
cache, out, batch = step(cache, again, num_tokens, total_tokens=60)
# --8<-- [end:refused]
assert batch.status.tolist() == [5, 5, 0, 5]

# --8<-- [start:slow]
# Raises if the step copies the pool although the cache is donated. It takes
# shapes, so that the pool can be as large as yours: nothing is allocated.
large = replace(config, num_pages=4096)
jaxkv.testing.assert_in_place(
    partial(step, total_tokens=60),
    jax.eval_shape(lambda: jaxkv.init(large)),
    seqs,
    num_tokens,
)
# Logs what is compiled: here nothing, as these shapes were there before.
with jax.log_compiles():
    cache, out, batch = step(cache, seqs, num_tokens, total_tokens=60)
# --8<-- [end:slow]
