"""A cache in a file, and a sequence in another cache."""

import pickle
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv.models import ModelConfig, random_model

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_context=256,
)
model = random_model(MODEL, jax.random.key(0))
folder = tempfile.TemporaryDirectory()
FILE = Path(folder.name) / "cache.pickle"


@partial(jax.jit, donate_argnames="cache")
def step(model, cache, seqs, tokens, num_tokens):
    cache, batch = jaxkv.allocate(
        cache, seqs, num_tokens, total_tokens=len(tokens)
    )
    logits, cache = model(tokens, cache, batch, rows=batch.last_rows)
    return cache, jnp.argmax(logits, axis=-1), batch.status


config = model.cache_config(num_pages=16, page_size=4, max_seqs=2)
prompt, length = jaxkv.pack([list(range(1, 12))])
cache, token, status = step(
    model, jaxkv.init(config), jnp.array([0]), prompt, length
)

# --8<-- [start:file]
# A cache is a pytree: anything that stores pytrees stores it, with its config.
FILE.write_bytes(pickle.dumps(jax.device_get(cache)))

# In another process. With a sharding as the second argument it goes to a mesh.
restored = jax.device_put(pickle.loads(FILE.read_bytes()))
jaxkv.check_invariants(restored)
# --8<-- [end:file]


# --8<-- [start:move]
@partial(
    jax.jit, donate_argnames="target", static_argnames=("layers", "room")
)
def copy_sequence(source, slot, target, to, *, layers, room):
    """What `slot` holds in one cache, as a new sequence of another one."""
    length = jaxkv.lengths(source)[slot][None]
    target, batch = jaxkv.allocate(
        target, to[None], length, total_tokens=room
    )
    for layer in range(layers):
        k, v, _ = jaxkv.gather(source, layer, slot[None])
        target = jaxkv.append(target, layer, batch, k[0, :room], v[0, :room])
    return target, batch.status


# For instance of int8, with longer rows and pages of 16.
other = jaxkv.init(
    model.cache_config(num_pages=16, page_size=16, quantization="int8")
)
room = config.max_tokens_per_seq
other, status = copy_sequence(
    restored, jnp.int32(0), other, jnp.int32(3), layers=2, room=room
)
jaxkv.raise_for_status(status)
# --8<-- [end:move]

assert jaxkv.lengths(other).tolist()[3] == 11
one = jnp.array([1])
others = [
    step(model, kept, jnp.array([slot]), token, one)[1].tolist()
    for kept, slot in ((other, 3), (restored, 0), (cache, 0))
]
print(
    "the next token: continued, restored, moved to int8:", *reversed(others)
)
assert others[1] == others[2]
