"""Like tokens become one (after KVMerger, arXiv:2407.08454)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxkv.config import CacheConfig
from jaxkv.policies.attention_mass import accumulate, step_of, zeros
from jaxkv.policies.base import TokenPolicy, Tokens, check_counts, where_tokens
from jaxkv.rewrite import numbers, stored_as
from jaxkv.state import Batch, KVCache, KVPool, PolicyState

# Of a token that received nothing, in a mean.
_LEAST_WEIGHT = 1e-6


class Sums(NamedTuple):
    """Of the tokens of each run: keys and values times their weights, the weights, the attention."""

    k: Array
    v: Array
    weight: Array
    mass: Array


@dataclass(frozen=True)
class SemanticMerge(TokenPolicy):
    """Merges neighbours whose keys are most alike, until `budget` tokens are left.

    In each layer and KV head on its own. Where a key's cosine similarity to the one before it is among the
    highest, the two become one token; so may a run of them. Its key and value are the means of theirs,
    weighted by the attention that they received, and it carries the sum of that.

    Attributes:
      budget: token places a sequence keeps, the recent ones among them.
      recent: last tokens that are not merged.
      positions, rope: see `TokenPolicy`.

    Raises:
      ValueError: for a `recent` beyond the budget.
    """

    recent: int

    needs_mass: ClassVar[bool] = True
    reads_keys: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, least={"recent": 0}, budget="recent")

    def first_values(self, config: CacheConfig) -> dict[str, Array]:
        """`mass`: attention received so far."""
        return {"mass": zeros(config)}

    def observe(
        self, state: PolicyState, cache: KVCache, batch: Batch, mass: Array | None = None
    ) -> PolicyState:
        """Adds a step's attention; see `Policy.observe`."""
        self.check_state(state, cache.config)
        return accumulate(state, step_of(state, cache, batch, mass))

    def rank(self, tokens: Tokens) -> Array:
        """How little a token is like the one before it, with which it would be merged."""
        k = tokens.keys
        assert k is not None
        k = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-20)
        unlike = -jnp.sum(k[..., 1:, :] * k[..., :-1, :], axis=-1)
        unlike = jnp.pad(unlike, ((0, 0), (0, 0), (1, 0)), constant_values=jnp.inf)
        return jnp.where(tokens.place >= tokens.lengths - self.recent, jnp.inf, unlike)

    def gather(
        self, config: CacheConfig, tokens: Tokens, kept: Array, read: Callable[[Array], KVPool]
    ) -> tuple[KVPool, dict[str, Array]]:
        """The means of runs that begin at the places kept; what was not merged stays as it is stored."""
        mass, nowhere = tokens.values["mass"], tokens.place.shape[0]
        end = jnp.broadcast_to(tokens.lengths, (*kept.shape[:2], 1))
        end = jnp.concatenate([kept[..., 1:], end], axis=-1)
        first = read(kept)

        def weighted(nth: Array, place: Array, stored: KVPool) -> Sums:
            received = jnp.where(
                place < end, jnp.take_along_axis(mass, kept + nth, axis=-1, mode="clip"), 0.0
            )
            weight = jnp.where(place < end, jnp.maximum(received, _LEAST_WEIGHT), 0.0)[..., None]
            k, v = numbers(config, stored.k, stored.k_scale), numbers(config, stored.v, stored.v_scale)
            return Sums(k * weight, v * weight, weight, received)

        def join(nth: Array, sums: Sums) -> Sums:
            place = kept + nth
            stored = read(jnp.where(place < end, place, nowhere))
            return jax.tree.map(jnp.add, sums, weighted(nth, place, stored))

        # As many trips as the longest run has tokens.
        most = jnp.max(jnp.where(tokens.lengths > 0, end - kept, 0))
        sums = jax.lax.fori_loop(1, most, join, weighted(jnp.zeros((), jnp.int32), kept, first))
        (k, k_scale), (v, v_scale) = (
            stored_as(config, part / jnp.maximum(sums.weight, _LEAST_WEIGHT), keys=keys)
            for part, keys in ((sums.k, True), (sums.v, False))
        )
        means = replace(first, k=k, v=v, k_scale=k_scale, v_scale=v_scale)
        merged = end - kept > 1
        stored = jax.tree.map(lambda new, old: where_tokens(merged, new, old), means, first)
        return stored, {"mass": sums.mass}
