"""The public functions under `jit`, for tests that are not about it: op by op they are slow."""

import jax

import jaxkv

init = jax.jit(jaxkv.init, static_argnums=(0, 1))
allocate = jax.jit(jaxkv.allocate, static_argnames="total_tokens")
append = jax.jit(jaxkv.append)
attend = jax.jit(
    jaxkv.attend,
    static_argnames=("scale", "window", "sink_tokens", "softcap", "backend", "return_lse"),
)
attention_mass = jax.jit(
    jaxkv.attention_mass, static_argnames=("scale", "window", "sink_tokens", "softcap", "backend")
)
observe = jax.jit(jaxkv.observe)
evict = jax.jit(jaxkv.evict)
gather = jax.jit(jaxkv.gather)
fork = jax.jit(jaxkv.fork)
reorder = jax.jit(jaxkv.reorder)
free = jax.jit(jaxkv.free)
truncate = jax.jit(jaxkv.truncate)
compact = jax.jit(jaxkv.compact)
shift_positions = jax.jit(jaxkv.shift_positions, static_argnames=("rope", "first"))
match_prefix = jax.jit(jaxkv.match_prefix)
record_prefix = jax.jit(jaxkv.record_prefix)
clear_prefixes = jax.jit(jaxkv.clear_prefixes)
