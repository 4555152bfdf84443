"""Speculative serving: tokens proposed from the prompt, and a drafter of your own."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxkv.models import ModelConfig, random_model
from jaxkv.serving import PromptLookup, Request, ServingConfig, serve

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
requests = [
    Request(tokens=[1, 2, 3, 4] * 5, max_new_tokens=24),
    Request(tokens=[9, 8, 7], max_new_tokens=24),
]
cache = model.cache_config(
    num_pages=64, page_size=8, max_seqs=4, max_pages_per_seq=16
)


def texts(config):
    new, steps = {}, 0

    def look(state):
        nonlocal steps
        steps = int(state.stats.steps)

    for event in serve(model, config, requests, on_state=look):
        new[event.id] = new.get(event.id, ()) + event.tokens
    return new, steps


# --8<-- [start:lookup]
plain, steps = texts(ServingConfig(cache, token_budget=32))
looked_up, fewer = texts(
    ServingConfig(
        cache, token_budget=32, speculate=PromptLookup(ngram=2, num_tokens=3)
    )
)
print(
    f"{steps} steps, {fewer} with prompt lookup, and the same texts: {plain == looked_up}"
)
# --8<-- [end:lookup]

# --8<-- [start:drafter]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Repeat:
    """Proposes the newest token again: the smallest drafter there is. It keeps no state."""

    num_tokens: int = 2

    def init(self, config):
        return None

    def propose(self, state, tokens, lengths):
        newest = jnp.take_along_axis(
            tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1
        )
        proposed = jnp.broadcast_to(newest, (len(lengths), self.num_tokens))
        return state, proposed, jnp.where(lengths > 0, self.num_tokens, 0)


repeated, steps = texts(
    ServingConfig(cache, token_budget=32, speculate=Repeat())
)
# --8<-- [end:drafter]

assert plain == looked_up == repeated
