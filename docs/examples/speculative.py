"""Speculative decoding by hand: one model proposes, another verifies."""

from functools import partial

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv.models import ModelConfig, random_model

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_context=256,
)
large = random_model(MODEL, jax.random.key(0))
# In practice another model. Here the same one, with a cache of eight bits, which
# mostly agrees.
small, small_format = large, {"quantization": "int8"}
prompt, new_tokens = [3, 1, 4, 1, 5], 24

# --8<-- [start:loop]
PROPOSED = 3
sizes = dict(num_pages=64, page_size=4, max_seqs=1)
seqs = jnp.array([0])


@partial(jax.jit, donate_argnames="cache")
def step(model, cache, tokens, num_tokens):
    """Logits after every token."""
    cache, batch = jaxkv.allocate(
        cache, seqs, num_tokens, total_tokens=tokens.shape[0]
    )
    logits, cache = model(tokens, cache, batch)
    return cache, jnp.argmax(logits, axis=-1), batch.status


@partial(jax.jit, donate_argnames="cache")
def back_to(cache, length):
    cache, status = jaxkv.truncate(cache, seqs, length)
    return cache


def feed(model, cache, tokens):
    """Padded to one width, so that the step compiles once."""
    packed, count = jaxkv.pack([tokens], total_tokens=8)
    cache, choices, status = step(model, cache, packed, count)
    jaxkv.raise_for_status(status)
    return cache, choices[: len(tokens)].tolist()


verifier = jaxkv.init(large.cache_config(**sizes))
drafter = jaxkv.init(small.cache_config(**sizes, **small_format))
verifier, choices = feed(large, verifier, prompt)
text, steps = [*prompt, choices[-1]], 0
while len(text) < len(prompt) + new_tokens:
    draft = list(text)
    for _ in range(PROPOSED):
        unread = draft[int(jaxkv.lengths(drafter)[0]) :]
        drafter, choices = (
            feed(small, drafter, unread[:8])
            if len(unread) <= 8
            else (drafter, [])
        )
        draft.append(choices[-1])
    proposed = draft[len(text) :]
    # One ragged step of the large model: the newest token and all that was proposed.
    verifier, choices = feed(large, verifier, [text[-1], *proposed])
    agreed = 0
    while agreed < PROPOSED and proposed[agreed] == choices[agreed]:
        agreed += 1
    text += [*proposed[:agreed], choices[agreed]]
    steps += 1
    # Both caches forget what was not accepted; the newest token is in neither.
    verifier = back_to(verifier, jnp.array([len(text) - 1]))
    drafter = back_to(
        drafter, jnp.minimum(jaxkv.lengths(drafter), len(text) - 1)
    )
# --8<-- [end:loop]
print(f"{len(text) - len(prompt)} tokens in {steps} steps of the large model")

plain = jaxkv.generate(large, [prompt], max_new_tokens=new_tokens).tokens[0][
    0
]
assert text[len(prompt) :][:new_tokens] == plain
