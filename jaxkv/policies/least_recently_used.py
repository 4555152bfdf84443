"""Keeps the tokens that were attended to most recently."""

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
    """Drops the tokens whose last use is longest ago.

    A token is used when it is appended, and in each step whose queries give it more attention than
    `threshold`. Each layer and KV head chooses separately. Of two tokens unused for more than
    `2**31 / max_tokens` tokens the older is dropped first.

    Attributes:
      budget: tokens that a sequence keeps.
      threshold: for the attention that a token receives in one step, summed over the queries of the step and
        the query heads of its KV head.
      positions, rope: see `TokenPolicy`.

    Raises:
      ValueError: for a negative threshold.
    """

    name: ClassVar[str] = "lru"

    threshold: float = 0.01

    needs_mass: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        threshold = real(self.threshold)
        if threshold is None or not 0 <= threshold < inf:
            raise ValueError(f"threshold={self.threshold!r} must be a finite number, 0 or more")
        object.__setattr__(self, "threshold", threshold)

    def first_values(self, config: CacheConfig) -> dict[str, Array]:
        """`used`: the sequence's clock when a token was last used; `clock`: its tokens so far."""
        return {"used": zeros(config, jnp.int32), "clock": jnp.zeros(config.max_seqs, jnp.int32)}

    def note(self, values: dict[str, Array], step: Step, batch: Batch) -> dict[str, Array]:
        """Records which tokens a step used."""
        # Positions cannot serve as the clock: they may be renumbered. A sequence that starts in this step
        # starts its clock at 0.
        before = batch.kv_lengths - batch.num_tokens
        began = jnp.where(before > 0, rows_of(values["clock"], step.slot), 0)
        now = began + batch.num_tokens
        appended = began[:, None, None, None] + step.indices - before[:, None, None, None] + 1
        used = jnp.where(step.is_new, appended, rows_of(values["used"], step.slot))
        used = jnp.where(step.mass > self.threshold, now[:, None, None, None], used)
        return {
            "used": values["used"].at[step.slot].set(used, mode="drop"),
            "clock": values["clock"].at[step.slot].set(now, mode="drop"),
        }

    def rank(self, tokens: Tokens) -> Array:
        """When the token was last used; of tokens used at the same time the later ranks higher."""
        max_tokens = tokens.indices.shape[-1]
        used = jnp.where(tokens.indices < tokens.lengths, tokens.values["used"], 0)
        age = jnp.minimum(jnp.max(used, axis=-1, keepdims=True) - used, _MOST // max_tokens - 1)
        return tokens.indices - age * max_tokens
