"""A language model whose next token depends on every token before it, through the cache, without rounding.

Each layer stores a number for each token and attends to all of them alike, so that attention is their mean;
the sum is a whole number. A page of another text, a token too many, or another position changes it.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv import CacheConfig
from jaxkv.sampling import SamplingBatch, plain, sample_each

VOCAB = 24
TABLE = np.random.default_rng(5).normal(0, 2, (101, VOCAB)).astype(np.float32)


def value(token, layer):
    return (token * 7 + layer * 3) % 31 + 1


@jax.tree_util.register_static
@dataclass(frozen=True)
class HistoryModel:
    config: CacheConfig

    def __call__(self, tokens, cache, batch, *, rows=None, return_mass=False):
        state, masses = batch.positions, []
        for layer in range(self.config.num_layers):
            group, _ = self.config.homes[layer]
            of = self.config.groups[group]
            shape = tokens.shape[0], of.num_kv_heads, of.head_dim
            v = jnp.broadcast_to(value(tokens, layer).astype(jnp.float32)[:, None, None], shape)
            cache = jaxkv.append(cache, layer, batch, jnp.zeros_like(v), v)
            q = jnp.zeros_like(v)
            mean, lse = jaxkv.attend(cache, layer, batch, q, return_lse=True)
            mean = mean[:, 0, 0]
            if return_mass:
                masses.append(jaxkv.attention_mass(cache, layer, batch, q, lse))
            seen = batch.positions + 1
            seen = seen if of.window is None else jnp.minimum(seen, of.window)
            # NaN, of a refused token or a leak, is no number to round.
            total = jnp.where(jnp.isnan(mean), -1e6, mean * seen.astype(jnp.float32))
            state += (2 * layer + 3) * jnp.round(total).astype(jnp.int32)
        state = state if rows is None else state[rows]
        logits = jnp.asarray(TABLE)[state % len(TABLE)]
        return (logits, cache, jnp.stack(masses)) if return_mass else (logits, cache)

    def cache_config(self, **sizes):
        return replace(self.config, **sizes)


def logits(text, config):
    """Those after the last token, in plain Python."""
    state = len(text) - 1
    for layer in range(config.num_layers):
        window = config.groups[config.homes[layer][0]].window
        state += (2 * layer + 3) * sum(value(token, layer) for token in text[-(window or len(text)) :])
    return TABLE[state % len(TABLE)]


@jax.jit
def _draw(logits, seed, sample, number, temperature, top_k, top_p, min_p):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), number)
    settings = SamplingBatch(temperature[None], top_k[None], top_p[None], min_p[None], sorts=True)
    return sample_each(key[None], logits[None], settings)[0]


def draw(logits, request, sample, number):
    """Token `number` of a sample, as the contract has it."""
    if request.sampling.temperature == 0:
        return int(np.argmax(logits))
    temperature, top_k, top_p, min_p = plain(request.sampling)
    seed, sample, number, top_k = np.uint32(request.seed), np.int32(sample), np.int32(number), np.int32(top_k)
    floats = np.float32(temperature), np.float32(top_p), np.float32(min_p)
    return int(_draw(logits, seed, sample, number, floats[0], top_k, *floats[1:]))


def alone(request, sample, config, limit):
    """The text of a sample, its prompt first, and whether a stop token ended it: what every server must give.

    Args:
      limit: most tokens in all.
    """
    text = list(request.tokens)
    most = min(limit, len(text) + request.max_new_tokens, config.max_tokens_per_seq + 1)
    while len(text) < most:
        text.append(draw(logits(text, config), request, sample, len(text) - len(request.tokens)))
        if text[-1] in request.stop_tokens:
            return text, True
    return text, False
