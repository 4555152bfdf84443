"""Like tokens become one (after KVMerger, arXiv:2407.08454, with its Gaussian weights and pivotal tokens)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxkv.config import CacheConfig
from jaxkv.policies.attention_mass import MassPolicy
from jaxkv.policies.token_policy import Tokens, where_tokens
from jaxkv.rewrite import numbers, stored_as
from jaxkv.state import KVPool

# Of a token that received nothing, in a mean.
_LEAST_WEIGHT = 1e-6
# How fast a token's weight falls with its key's distance from the representative's, 1 - cosine.
_REACH = 0.05


@dataclass(frozen=True)
class SemanticMerge(MassPolicy):
    """Merges neighbours that are most alike, until `budget` tokens are left.

    In each layer and KV head on its own. What merging two neighbours loses is taken for
    `a b / (a + b) * (1 - cos)`: the attention that they received, and the cosine of their keys. Where that is
    least, the two become one token, and so may a run of them. Of a run the token that received most attention
    stays, with its key and what it received. Its value becomes the mean of theirs, weighted by their
    attention and by `exp(-(1 - cos) / 0.05)`, their likeness to it.

    (Means of keys made perplexity worse: neighbours' keys are turned to different positions. So did sums of
    attention: tokens merged once were then kept before others that receive more.)

    Attributes:
      budget: token places a sequence keeps, the recent ones among them.
      recent: last tokens that are not merged.
      positions, rope: see `TokenPolicy`.

    Raises:
      ValueError: for a `recent` of the budget or beyond.
    """

    reads_keys: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.recent == self.budget:
            raise ValueError(
                f"budget={self.budget} leaves no token to merge into beside recent={self.recent}"
            )

    def rank(self, tokens: Tokens) -> Array:
        """What would be lost if a token were merged with the one before it."""
        k = tokens.keys
        assert k is not None
        mass = jnp.maximum(tokens.values["mass"], _LEAST_WEIGHT)
        before, own = mass[..., :-1], mass[..., 1:]
        loss = before * own / (before + own) * (1.0 - _cosine(k[..., :-1, :], k[..., 1:, :]))
        loss = jnp.pad(loss, ((0, 0), (0, 0), (1, 0)), constant_values=jnp.inf)
        return self.spare_recent(loss, tokens)

    def gather(
        self, config: CacheConfig, tokens: Tokens, kept: Array, read: Callable[[Array], KVPool]
    ) -> tuple[KVPool, dict[str, Array], Array]:
        """Of each run that begins at a place kept, its representative with the mean value."""
        mass, nowhere = tokens.values["mass"], tokens.place.shape[0]
        end = jnp.broadcast_to(tokens.lengths, (*kept.shape[:2], 1))
        end = jnp.concatenate([kept[..., 1:], end], axis=-1)
        # As many trips as the longest run has tokens.
        longest = jnp.max(jnp.where(tokens.lengths > 0, end - kept, 0))

        def received(place: Array) -> Array:
            return jnp.where(place < end, jnp.take_along_axis(mass, place, axis=-1, mode="clip"), -1.0)

        def elect(nth: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            place, most = best
            more = received(kept + nth)
            return jnp.where(more > most, kept + nth, place), jnp.maximum(most, more)

        place, most = jax.lax.fori_loop(1, longest, elect, (kept, received(kept)))
        representative = read(place)
        key = numbers(config, representative.k, representative.k_scale)

        def join(nth: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            values, weights = sums
            place = kept + nth
            one = read(jnp.where(place < end, place, nowhere))
            unlike = 1.0 - _cosine(numbers(config, one.k, one.k_scale), key)
            weight = jnp.maximum(received(place), _LEAST_WEIGHT) * jnp.exp(-unlike / _REACH)
            weight = jnp.where(place < end, weight, 0.0)[..., None]
            return values + weight * numbers(config, one.v, one.v_scale), weights + weight

        nothing = jnp.zeros_like(key), jnp.zeros((*kept.shape, 1), jnp.float32)
        values, weights = jax.lax.fori_loop(0, longest, join, nothing)
        v, v_scale = stored_as(config, values / jnp.where(weights > 0, weights, 1.0), keys=False)
        merged = replace(representative, v=v, v_scale=v_scale)
        # What was not merged stays as it is stored.
        stored = jax.tree.map(lambda new, old: where_tokens(end - kept > 1, new, old), merged, representative)
        return stored, {"mass": jnp.maximum(most, 0.0)}, place


def _cosine(one: Array, other: Array) -> Array:
    norms = jnp.linalg.norm(one, axis=-1) * jnp.linalg.norm(other, axis=-1)
    return jnp.sum(one * other, axis=-1) / jnp.maximum(norms, 1e-20)
