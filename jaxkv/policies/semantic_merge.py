"""Like tokens become one (after KVMerger, arXiv:2407.08454)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxkv.config import CacheConfig
from jaxkv.policies.attention_mass import accumulate, step_of, zeros
from jaxkv.policies.base import TokenPolicy, Tokens, check_counts, take_places, where_tokens
from jaxkv.rewrite import numbers, stored_as
from jaxkv.state import Batch, KVCache, KVPool, PolicyState

# Of a token that received nothing, in a mean.
_LEAST_WEIGHT = 1e-6


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

    def combine(
        self, config: CacheConfig, row: KVPool, tokens: Tokens, kept: Array
    ) -> tuple[KVPool, dict[str, Array]]:
        """The means of runs that begin at the places kept; what was not merged stays as it is stored."""
        real = tokens.place < tokens.lengths
        mass = jnp.where(real, tokens.values["mass"], 0.0)
        weight = jnp.where(real, jnp.maximum(mass, _LEAST_WEIGHT), 0.0)
        entry, head = (jnp.arange(size, dtype=jnp.int32) for size in kept.shape[:2])
        at = entry[:, None, None], head[:, None]
        begins = jnp.zeros(mass.shape, jnp.int32).at[*at, kept].set(1)
        run = jnp.cumsum(begins, axis=-1, dtype=jnp.int32) - 1

        def total(x: Array) -> Array:
            return jnp.zeros((*kept.shape, *x.shape[3:]), x.dtype).at[*at, run].add(x)

        merged = total(real.astype(jnp.int32) + jnp.zeros_like(run)) > 1
        stays, whole = jax.tree.map(lambda x: take_places(x, kept), row), total(weight)[..., None]

        def mean(stored, scale):
            values = jnp.where(real[..., None], numbers(config, stored, scale), 0.0)
            return stored_as(config, total(values * weight[..., None]) / whole)

        k, k_scale = mean(row.k, row.k_scale)
        v, v_scale = mean(row.v, row.v_scale)
        means = replace(row, k=k, v=v, k_scale=k_scale, v_scale=v_scale)
        stored = jax.tree.map(lambda new, old: where_tokens(merged, new, old), means, stays)
        return stored, {"mass": total(mass)}
