"""Compresses a prompt once to the tokens that its last tokens attend to (SnapKV, arXiv:2404.14469)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jaxkv.config import CacheConfig
from jaxkv.entries import lengths_of, rows_of
from jaxkv.policies.attention_mass import zeros
from jaxkv.policies.base import Step, check_counts
from jaxkv.policies.token_policy import TokenPolicy, Tokens
from jaxkv.state import Batch, KVCache


@dataclass(frozen=True)
class PromptCompress(TokenPolicy):
    """Once, after prefill, keeps the prompt's last `observe_last` tokens and those they attend to most.

    Each layer and KV head chooses separately. The attention that a token received is averaged with that of
    its neighbours, so that passages are kept together. Observe only the step with the prompt's last tokens;
    then call `jaxkv.evict`, which compresses a sequence if no token was appended since. New tokens are all
    kept: a row must hold the whole prompt, and later the budget and all new tokens.

    Attributes:
      budget: tokens kept of a prompt, including the observed ones.
      observe_last: tokens at its end whose attention decides.
      kernel: tokens averaged, including the token itself; odd.
      positions, rope: see `TokenPolicy`.

    Raises:
      ValueError: for settings that contradict each other.
    """

    name: ClassVar[str] = "prompt-compress"

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
        """`mass`: attention from the last tokens; `seen`: length when observed, 0 once compressed."""
        return {"mass": zeros(config), "seen": jnp.zeros(config.max_seqs, jnp.int32)}

    def note(self, values: dict[str, Array], step: Step, batch: Batch) -> dict[str, Array]:
        """Replaces what was recorded by this step's attention and length."""
        return {
            "mass": values["mass"].at[step.slot].set(step.mass, mode="drop"),
            "seen": values["seen"].at[step.slot].set(batch.kv_lengths, mode="drop"),
        }

    def most_positions(self, config: CacheConfig) -> int | None:
        """None: new tokens are all kept."""
        return None

    def last_step(self) -> int:
        """The observed tokens."""
        return self.observe_last

    def most_at_once(self, config: CacheConfig, largest: int) -> int:
        """All: a row holds the whole prompt."""
        return largest

    def shared_unit(self, config: CacheConfig, largest: int) -> int:
        """A page: nothing is evicted during prefill."""
        return config.page_size

    def last_position(self, config: CacheConfig, num_tokens: int, new_tokens: int, largest: int) -> int:
        """All new tokens come after the prompt, or after the compressed prompt."""
        return new_tokens + (num_tokens if self.positions == "original" else min(num_tokens, self.budget))

    def token_slots(self, config: CacheConfig, num_tokens: int, new_tokens: int, largest: int) -> int:
        """The whole prompt, or the compressed prompt and all new tokens."""
        return max(num_tokens, self.capacity(config) + new_tokens)

    def is_due(self, cache: KVCache, slot: Array) -> Array:
        """Whether the prompt exceeds the budget and no token was appended since it was observed."""
        assert cache.policy is not None
        length = lengths_of(cache.table, slot, cache.config)
        return (length > self.budget) & (rows_of(cache.policy.values["seen"], slot) == length)

    def forget(self, values: dict[str, Array], slot: Array) -> dict[str, Array]:
        """A sequence that changed or was compressed is not compressed again until it is observed."""
        return values | {"seen": values["seen"].at[slot].set(0, mode="drop")}

    def rank(self, tokens: Tokens) -> Array:
        """Attention that a token and its neighbours received; infinity for the observed tokens."""
        observed = tokens.indices >= tokens.lengths - self.observe_last
        mass = jnp.where(observed, 0.0, tokens.values["mass"])
        reach = self.kernel // 2
        padded = jnp.pad(mass, ((0, 0), (0, 0), (reach, reach)))
        pooled = sum(padded[..., nth : nth + mass.shape[-1]] for nth in range(self.kernel))
        return jnp.where(observed, jnp.inf, pooled)
