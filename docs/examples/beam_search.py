"""Beam search: in one call, and by hand with `reorder`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

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
prompt, steps, width = [3, 1, 4, 1, 5], 12, 4

# --8<-- [start:call]
result = jaxkv.beam_search(
    model, [prompt], width=width, max_new_tokens=steps, length_penalty=0.0
)
for tokens, score in zip(result.tokens[0], result.scores[0]):
    print(f"{score:.3f}", tokens)
# --8<-- [end:call]

# --8<-- [start:by_hand]
config = model.cache_config(num_pages=64, page_size=4, max_seqs=width)
beams = jnp.arange(width, dtype=jnp.int32)  # each in a slot of the cache


@partial(jax.jit, donate_argnames="cache")
def prefill(model, cache, tokens):
    cache, batch = jaxkv.allocate(
        cache,
        beams[:1],
        jnp.array([tokens.shape[0]]),
        total_tokens=tokens.shape[0],
    )
    logits, cache = model(tokens, cache, batch, rows=batch.last_rows)
    log_probs, first = jax.lax.top_k(jax.nn.log_softmax(logits[0]), width)
    cache, status = jaxkv.fork(
        cache, beams[:1].repeat(width - 1), beams[1:]
    )  # shares every page
    return cache, log_probs, first, status


@partial(jax.jit, donate_argnames="cache")
def step(model, cache, scores, tokens):
    cache, batch = jaxkv.allocate(cache, beams, jnp.ones_like(beams))
    logits, cache = model(tokens, cache, batch)
    totals = scores[:, None] + jax.nn.log_softmax(logits)
    scores, best = jax.lax.top_k(totals.ravel(), width)
    parents, tokens = best // totals.shape[1], best % totals.shape[1]
    cache, status = jaxkv.reorder(
        cache, beams, parents
    )  # beam i continues beam parents[i]
    return cache, scores, tokens, parents, status


cache, scores, tokens, status = prefill(
    model, jaxkv.init(config), jnp.array(prompt)
)
texts = np.asarray(tokens)[:, None]
for _ in range(steps - 1):
    cache, scores, tokens, parents, status = step(
        model, cache, scores, tokens
    )
    texts = np.concatenate(
        [texts[np.asarray(parents)], np.asarray(tokens)[:, None]], axis=1
    )
jaxkv.raise_for_status(status)
# --8<-- [end:by_hand]
used = config.num_pages - int(cache.table.num_free)
print(
    f"{used} pages in use, {width * -(-(len(prompt) + steps) // config.page_size)} without sharing"
)

assert result.tokens[0] == texts.tolist()
np.testing.assert_allclose(result.scores[0], scores, rtol=1e-5)
