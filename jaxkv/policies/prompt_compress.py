"""A prompt, cut once to what its end looked at (SnapKV, arXiv:2404.14469)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jaxkv.config import CacheConfig
from jaxkv.entries import rows_of
from jaxkv.policies.attention_mass import zeros
from jaxkv.policies.base import Step, check_counts
from jaxkv.policies.token_policy import TokenPolicy, Tokens
from jaxkv.state import Batch, KVCache


@dataclass(frozen=True)
class PromptCompress(TokenPolicy):
    """Once, after prefill, keeps the prompt's last `observe_last` tokens and those that they looked at.

    In each layer and KV head on its own. What a token received is averaged with its neighbours', so that a
    passage stays together. Observe the step that brings the prompt's last tokens, and no others; then call
    `jaxkv.evict`: a sequence is cut if it is as long as when it was observed last.
    What is generated afterwards stays: a row must hold the budget and all new tokens, and at first the whole
    prompt.

    Attributes:
      budget: token places that are left of a prompt, the observed ones among them.
      observe_last: tokens at its end that say what matters.
      kernel: neighbours that are averaged, the token among them; odd.
      positions, rope: see `TokenPolicy`.

    Raises:
      ValueError: for settings that contradict each other.
    """

    observe_last: int = 32
    kernel: int = 5

    needs_mass: ClassVar[bool] = True
    once: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, least={"observe_last": 1, "kernel": 1}, budget="observe_last")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd")

    def first_values(self, config: CacheConfig) -> dict[str, Array]:
        """`mass`: what the last tokens gave; `seen`: places of the sequence then, 0 when it was cut."""
        return {"mass": zeros(config), "seen": jnp.zeros(config.max_seqs, jnp.int32)}

    def note(self, values: dict[str, Array], step: Step, batch: Batch) -> dict[str, Array]:
        """What this step's tokens looked at, instead of what was noted before."""
        return {
            "mass": values["mass"].at[step.slot].set(step.mass, mode="drop"),
            "seen": values["seen"].at[step.slot].set(batch.kv_lengths, mode="drop"),
        }

    def most_positions(self, config: CacheConfig) -> int | None:
        """As many as tokens: what is generated stays."""
        return None

    def last_step(self) -> int:
        """The observed tokens."""
        return self.observe_last

    def most_at_once(self, config: CacheConfig, largest: int) -> int:
        """A row holds the whole prompt."""
        return largest

    def shared_unit(self, config: CacheConfig, largest: int) -> int:
        """Nothing is evicted on the way."""
        return config.page_size

    def last_position(self, config: CacheConfig, num_tokens: int, new_tokens: int, largest: int) -> int:
        """All new tokens come after the prompt, or after what is left of it."""
        return new_tokens + (num_tokens if self.positions == "original" else min(num_tokens, self.budget))

    def token_slots(self, config: CacheConfig, num_tokens: int, new_tokens: int, largest: int) -> int:
        """The whole prompt, or what is left of it and all new tokens."""
        return max(num_tokens, self.capacity(config) + new_tokens)

    def is_due(self, cache: KVCache, slot: Array) -> Array:
        """Whether nothing came in since the prompt was observed."""
        assert cache.policy is not None
        length = rows_of(cache.table.lengths, slot)
        return (length > self.budget) & (rows_of(cache.policy.values["seen"], slot) == length)

    def forget(self, values: dict[str, Array], slot: Array) -> dict[str, Array]:
        """What is no longer as it was observed is not cut, and what was cut is not cut again."""
        return values | {"seen": values["seen"].at[slot].set(0, mode="drop")}

    def rank(self, tokens: Tokens) -> Array:
        """What the observed tokens gave a place and its neighbours; these themselves above all."""
        observed = tokens.place >= tokens.lengths - self.observe_last
        mass = jnp.where(observed, 0.0, tokens.values["mass"])
        reach = self.kernel // 2
        padded = jnp.pad(mass, ((0, 0), (0, 0), (reach, reach)))
        places = mass.shape[-1]
        pooled = sum(padded[..., nth : nth + places] for nth in range(self.kernel))
        return jnp.where(observed, jnp.inf, pooled)
