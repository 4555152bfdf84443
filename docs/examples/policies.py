"""Bounding a sequence's memory: policies that are there, and one of your own."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv.models import ModelConfig, random_model
from jaxkv.policies import HeavyHitter, SlidingWindow, TokenPolicy

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_context=512,
)
model = random_model(MODEL, jax.random.key(0))
config = model.cache_config(num_pages=32, page_size=8, max_seqs=2)

# --8<-- [start:generate]
for policy in (None, SlidingWindow(32, sinks=4), HeavyHitter(32, recent=16)):
    result = jaxkv.generate(
        model,
        [[1, 2, 3]],
        config,
        max_new_tokens=100,
        policy=policy,
        keep=True,
    )
    kept, stats = jaxkv.lengths(result.cache)[0], result.cache.stats
    print(
        f"{policy}: {kept} token slots at the end, {stats.evicted_tokens} tokens evicted"
    )
# --8<-- [end:generate]

# --8<-- [start:own]


@dataclass(frozen=True)
class Thin(TokenPolicy):
    """Keeps the first four tokens, half a budget of the last ones, and every other one between."""

    def rank(self, tokens):
        kept = (tokens.indices < 4) | (
            tokens.indices >= tokens.lengths - self.budget // 2
        )
        return jnp.where(kept, 2, tokens.indices % 2)


result = jaxkv.generate(
    model,
    [[1, 2, 3]],
    config,
    max_new_tokens=100,
    policy=Thin(budget=32),
    keep=True,
)
# --8<-- [end:own]
assert int(jaxkv.lengths(result.cache).max()) <= 40

# --8<-- [start:attention]


@dataclass(frozen=True)
class Fading(TokenPolicy):
    """Keeps what got attention; what it got counts nine tenths a step later."""

    needs_mass = True

    def first_values(self, config):
        shape = config.num_kv_heads, config.max_tokens_per_seq
        return {
            "score": jnp.zeros((config.max_seqs, config.num_layers, *shape))
        }

    def note(self, values, step, batch):
        """After each step, with the attention that each token got in it."""
        score = values["score"]
        old = score.at[step.slot].get(mode="fill", fill_value=0)
        new = jnp.where(step.is_old, 0.9 * old, 0) + step.mass
        return {"score": score.at[step.slot].set(new, mode="drop")}

    def rank(self, tokens):
        return tokens.values["score"]


result = jaxkv.generate(
    model,
    [[1, 2, 3]],
    config,
    max_new_tokens=100,
    policy=Fading(budget=32),
    keep=True,
)
# --8<-- [end:attention]
assert int(jaxkv.lengths(result.cache).max()) <= 40

# --8<-- [start:loop]
cache = jaxkv.init(config, SlidingWindow(32, sinks=4))


@partial(jax.jit, donate_argnames="cache")
def step(model, cache, seqs, tokens):
    cache, batch = jaxkv.allocate(
        cache, seqs, jnp.ones_like(seqs)
    )  # evicts what is due
    logits, cache = model(
        tokens, cache, batch
    )  # `attend` applies the policy's window
    return cache, jnp.argmax(logits, axis=-1), batch.status


seqs, tokens = jnp.array([0]), jnp.array([1])
for _ in range(80):
    cache, tokens, status = step(model, cache, seqs, tokens)
jaxkv.raise_for_status(status)
print("after 80 tokens:", jaxkv.lengths(cache)[0], "in the cache")
# --8<-- [end:loop]
assert int(jaxkv.lengths(cache)[0]) <= 48
