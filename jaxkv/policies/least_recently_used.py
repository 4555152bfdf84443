"""The tokens that were attended to most recently."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jaxkv.arguments import real
from jaxkv.config import CacheConfig
from jaxkv.entries import rows_of
from jaxkv.policies.attention_mass import zeros
from jaxkv.policies.base import Step
from jaxkv.policies.token_policy import TokenPolicy, Tokens
from jaxkv.state import Batch

_MOST = 2**31


@dataclass(frozen=True)
class LeastRecentlyUsed(TokenPolicy):
    """Drops the tokens that have gone longest without receiving attention above the threshold.

    Of two unused for longer than `2**31 / max_tokens` tokens the older goes first, whichever was used last.

    A token is used where a step's queries gave it more than `threshold` in all, and when it comes in. In each
    layer and KV head on its own.

    Attributes:
      budget: token places a sequence keeps.
      threshold: of the attention that a token receives in one step, summed over the queries of the step and
        the query heads of its KV head.
      positions, rope: see `TokenPolicy`.

    Raises:
      ValueError: for a negative threshold.
    """

    threshold: float = 0.01

    needs_mass: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        threshold = real(self.threshold)
        if threshold is None or not 0 <= threshold < inf:
            raise ValueError(f"threshold={self.threshold!r} must be a finite number, 0 or more")
        object.__setattr__(self, "threshold", threshold)

    def first_values(self, config: CacheConfig) -> dict[str, Array]:
        """`used`: what the sequence's clock showed then; `clock`: tokens it has seen."""
        return {"used": zeros(config, jnp.int32), "clock": jnp.zeros(config.max_seqs, jnp.int32)}

    def note(self, values: dict[str, Array], step: Step, batch: Batch) -> dict[str, Array]:
        """The values, with the tokens that a step used."""
        # A clock of its own: positions may be counted anew. One that starts has all its tokens in this step.
        before = batch.kv_lengths - batch.num_tokens
        began = jnp.where(before > 0, rows_of(values["clock"], step.slot), 0)
        now = began + batch.num_tokens
        came_in = began[:, None, None, None] + step.place - before[:, None, None, None] + 1
        used = jnp.where(step.is_new, came_in, rows_of(values["used"], step.slot))
        used = jnp.where(step.mass > self.threshold, now[:, None, None, None], used)
        return {
            "used": values["used"].at[step.slot].set(used, mode="drop"),
            "clock": values["clock"].at[step.slot].set(now, mode="drop"),
        }

    def rank(self, tokens: Tokens) -> Array:
        """When it was last used; of those used at the same time the later token is the higher."""
        places = tokens.place.shape[-1]
        used = jnp.where(tokens.place < tokens.lengths, tokens.values["used"], 0)
        age = jnp.minimum(jnp.max(used, axis=-1, keepdims=True) - used, _MOST // places - 1)
        return tokens.place - age * places
