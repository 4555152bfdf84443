"""Like tokens become one (after KVMerger, arXiv:2407.08454, with its Gaussian weights)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkv.config import CacheConfig
from jaxkv.policies.attention_mass import MassPolicy
from jaxkv.policies.token_policy import Tokens, where_tokens
from jaxkv.rewrite import numbers, stored_as
from jaxkv.state import KVPool
from pallas_kernels import control_flow

# Of a token that received nothing, beside others.
_LEAST_WEIGHT = 1e-6
# How fast a token's weight falls with its key's distance from the representative's, 1 - cosine.
_REACH = 0.1


@dataclass(frozen=True)
class SemanticMerge(MassPolicy):
    """Merges neighbours that are most alike, until `budget` tokens are left.

    In each layer and KV head on its own. What merging two neighbours loses is taken for
    `a b / (a + b) * (1 - cos)`: the attention that they received, and the cosine of their keys. Where that is
    least, the two become one token, and so may a run of them. A run's first token stays, with its key and
    what it received. Its value takes in what each other token j of the run, which received `a_j` beside the
    first's `a`, added to the output of the queries so far:

        v + sum of min(a_j / a, 1) * exp(-(1 - cos) / 0.1) * (v_j - mean)

    A softmax without j gives its share to the others, who add about the mean of the sequence's values,
    weighted by what they received; the representative, which stands for j where their keys are alike, makes
    up for the difference. No number of it leaves the range of the run's values, so that a query which looks
    at the representative alone finds nothing that was not there.

    (Means of keys made perplexity worse: neighbours' keys are turned to different positions. So did sums of
    attention, by which tokens merged once were kept before others that receive more. Means of values, as in
    the paper, were worse than dropping at a quarter with half of it recent.)

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
        """Of each run the place kept, its first, with a value that answers for the others'."""
        length = jnp.broadcast_to(tokens.lengths, (*kept.shape[:2], 1))
        end = jnp.concatenate([kept[..., 1:], length], axis=-1)
        # As many trips as the longest run has more tokens.
        longest = jnp.max(jnp.where(tokens.lengths > 0, end - kept, 0))
        mass = jnp.maximum(tokens.values["mass"], _LEAST_WEIGHT)
        stored, own, _ = super().gather(config, tokens, kept, read)
        key, first = numbers(config, stored.k, stored.k_scale), numbers(config, stored.v, stored.v_scale)
        received = jnp.take_along_axis(mass, kept, axis=-1)
        mean = _mean_value(config, tokens, mass, read)

        def join(nth: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            value, least, most = carry
            place = kept + nth
            inside = (place < end)[..., None]
            one = read(jnp.where(place < end, place, tokens.place.shape[-1]))
            share = jnp.take_along_axis(mass, place, axis=-1, mode="clip") / received
            alike = jnp.exp((_cosine(numbers(config, one.k, one.k_scale), key) - 1.0) / _REACH)
            weight = jnp.where(inside, (jnp.minimum(share, 1.0) * alike)[..., None], 0.0)
            v = jnp.where(inside, numbers(config, one.v, one.v_scale), first)
            return value + weight * (v - mean), jnp.minimum(least, v), jnp.maximum(most, v)

        joined, least, most = control_flow.fori_loop(1, longest, join, (first, first, first))
        v, v_scale = stored_as(config, jnp.clip(joined, least, most), keys=False)
        merged = replace(stored, v=v, v_scale=v_scale)
        # What was not merged stays as it is stored.
        stored = jax.tree.map(lambda new, old: where_tokens(end - kept > 1, new, old), merged, stored)
        return stored, own, kept


def _mean_value(
    config: CacheConfig, tokens: Tokens, mass: Array, read: Callable[[Array], KVPool]
) -> Float[Array, "entries kv_heads 1 head_dim"]:
    """Of a sequence's values, by what they received: the mean output of its queries, nearly."""
    row = read(jnp.broadcast_to(tokens.place, mass.shape))
    used = tokens.place < tokens.lengths
    weights = jnp.where(used, mass, 0.0)[..., None]
    values = jnp.where(used[..., None], numbers(config, row.v, row.v_scale), 0.0)
    total = jnp.maximum(jnp.sum(weights, -2, keepdims=True), _LEAST_WEIGHT)
    return jnp.sum(weights * values, -2, keepdims=True) / total


def _cosine(one: Array, other: Array) -> Array:
    norms = jnp.linalg.norm(one, axis=-1) * jnp.linalg.norm(other, axis=-1)
    return jnp.sum(one * other, axis=-1) / jnp.maximum(norms, 1e-20)
