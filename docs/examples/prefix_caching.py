"""Prefix caching inside `jit`: prompts that begin alike are computed once."""

from functools import partial

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

# --8<-- [start:loop]
config = model.cache_config(
    num_pages=64, page_size=4, max_seqs=4, prefix_cache=True
)
WIDTH = 32  # tokens of a prompt, padded


@partial(jax.jit, donate_argnames="cache")
def prefill(model, cache, seqs, prompts, lengths):
    """Computes what no earlier prompt began with."""
    cache, found = jaxkv.match_prefix(cache, seqs, prompts, lengths)
    left = lengths - found
    cache, batch = jaxkv.allocate(
        cache, seqs, left, total_tokens=prompts.size
    )
    at = batch.entries, batch.positions
    tokens = prompts.at[at].get(mode="fill", fill_value=0)
    logits, cache = model(tokens, cache, batch, rows=batch.last_rows)
    cache = jaxkv.record_prefix(cache, seqs, prompts, lengths)
    return cache, jnp.argmax(logits, axis=-1), found, batch.status


def padded(texts):
    rows = jnp.array(
        [text + [0] * (WIDTH - len(text)) for text in texts], jnp.int32
    )
    return rows, jnp.array([len(text) for text in texts], jnp.int32)


system = list(range(1, 18))
cache = jaxkv.init(config)
first, lengths = padded([[*system, 30, 31]])
cache, answer, found, status = prefill(
    model, cache, jnp.array([0]), first, lengths
)
# Its pages stay findable until others need them.
cache = jaxkv.free(cache, jnp.array([0]))
second, lengths = padded([[*system, 40, 41, 42]])
cache, answer, found, status = prefill(
    model, cache, jnp.array([1]), second, lengths
)
print(
    f"{int(found[0])} of {int(lengths[0])} tokens were found"
)  # whole pages only
# --8<-- [end:loop]

assert found.tolist() == [16]
alone = jaxkv.generate(
    model, [[*system, 40, 41, 42]], max_new_tokens=1
).tokens
assert alone == [[answer.tolist()]]
