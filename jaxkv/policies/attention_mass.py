"""Base of the policies that rank tokens by the attention that they received."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jaxkv.config import CacheConfig
from jaxkv.entries import rows_of
from jaxkv.policies.base import Step, check_counts
from jaxkv.policies.token_policy import TokenPolicy, Tokens
from jaxkv.state import Batch


def zeros(config: CacheConfig, dtype=jnp.float32) -> Array:
    """A number for each token slot, layer and KV head, `[seqs, layers, kv_heads, max_tokens]`."""
    shape = config.max_seqs, len(config.full_layers), config.num_kv_heads, config.max_tokens_per_seq
    return jnp.zeros(shape, dtype)


@dataclass(frozen=True)
class MassPolicy(TokenPolicy):
    """Ranks tokens by the total attention that they received, and always keeps the `recent` last."""

    recent: int

    needs_mass: ClassVar[bool] = True

    def first_values(self, config: CacheConfig) -> dict[str, Array]:
        """`mass`: attention received so far."""
        return {"mass": zeros(config)}

    def note(self, values: dict[str, Array], step: Step, batch: Batch) -> dict[str, Array]:
        """Adds a step's attention."""
        mass = values["mass"]
        before = jnp.where(step.is_old, rows_of(mass, step.slot), 0.0)
        return {"mass": mass.at[step.slot].set(before + step.mass, mode="drop")}

    def spare_recent(self, rank: Array, tokens: Tokens) -> Array:
        """The rank, raised to infinity for the recent tokens."""
        return jnp.where(tokens.indices >= tokens.lengths - self.recent, jnp.inf, rank)

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, least={"recent": 0}, budget="recent")
