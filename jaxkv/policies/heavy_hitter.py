"""The tokens that received the most attention (H2O, arXiv:2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jaxkv.config import CacheConfig
from jaxkv.policies.attention_mass import accumulate, step_of, zeros
from jaxkv.policies.base import TokenPolicy, Tokens, check_counts
from jaxkv.state import Batch, KVCache, PolicyState


@dataclass(frozen=True)
class HeavyHitter(TokenPolicy):
    """Keeps the `recent` last tokens, and of the others those with the greatest accumulated attention.

    In each layer and KV head on its own: the heads of a model look at different tokens.

    Attributes:
      budget: token places a sequence keeps, the recent ones among them.
      recent: last tokens that stay whatever they received; a quarter of the budget and more does well.
      positions, rope: see `TokenPolicy`.

    Raises:
      ValueError: for a `recent` beyond the budget.
    """

    recent: int

    needs_mass: ClassVar[bool] = True

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
        """Attention received; the recent ones above all."""
        return jnp.where(tokens.place >= tokens.lengths - self.recent, jnp.inf, tokens.values["mass"])
