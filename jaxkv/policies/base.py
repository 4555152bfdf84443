"""The interface of an eviction policy.

A policy is a frozen dataclass of static settings. `jaxkv.init(config, policy)` makes it part of a cache;
`cache.policy.values` is its state:

    cache, batch = jaxkv.allocate(cache, seqs, num_tokens)     # evicts first what is due
    ... append and attend in each layer, and attention_mass if `policy.needs_mass`
    cache = jaxkv.observe(cache, batch, mass)                  # of all full layers, stacked

These functions call the policy's methods inside `jit`. `jaxkv.generate` also asks it how to chunk prompts.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.arguments import whole
from jaxkv.config import CacheConfig
from jaxkv.ownership import count
from jaxkv.rope import Rope
from jaxkv.state import AllocationStats, Batch, KVCache

Positions = Literal["original", "cache"]


class Step(NamedTuple):
    """One step of some sequences, as given to a policy.

    Attributes:
      slot: of each entry; `max_seqs` for padding and refused entries.
      mass: attention that each token slot received, `[entries, layers, kv_heads, max_tokens]`.
      is_new, is_old: `[entries, 1, 1, max_tokens]`, the step's own tokens and those before them.
      indices: of each token slot in its sequence, `[1, 1, 1, max_tokens]`.
    """

    slot: Int[Array, " entries"]
    mass: Float[Array, "entries layers kv_heads max_tokens"]
    is_new: Bool[Array, "entries 1 1 max_tokens"]
    is_old: Bool[Array, "entries 1 1 max_tokens"]
    indices: Int[Array, "1 1 1 max_tokens"]


@dataclass(frozen=True)
class Policy:
    """Which tokens to drop. A subclass implements `evict`; a subclass of `TokenPolicy` implements `rank`.

    Class attributes:
      name: in commands, for a policy that is exported from `jaxkv.policies`.
      needs_mass: whether `note` needs the attention that each token received.
      once: whether it compresses a prompt once, when `jaxkv.evict` is called. Then `allocate` evicts nothing,
        and decode steps need not be observed.
    """

    name: ClassVar[str | None] = None
    needs_mass: ClassVar[bool] = False
    once: ClassVar[bool] = False

    def capacity(self, config: CacheConfig) -> int:
        """Most token slots that a sequence fills if `evict` is called whenever it fills a page.

        Default: a whole row.
        """
        return config.max_tokens_per_seq

    def most_positions(self, config: CacheConfig) -> int | None:
        """The highest position that a decode loop reaches; None if positions grow with every token."""
        return None

    def most_kept(self, config: CacheConfig) -> int:
        """Most token slots that a sequence keeps after `evict`. Default: a page less than `capacity`."""
        return self.capacity(config) - config.page_size

    def check(self, config: CacheConfig) -> None:
        """Raises `ValueError` where the policy does not fit the cache, naming both sides."""
        shapes = {group.shape for group in config.groups if group.window is None}
        if len(shapes) != 1:
            found = "has none" if not shapes else f"has layers of {len(shapes)} shapes"
            raise ValueError(
                f"{self} acts on layers with full attention, all of one shape; the cache {found}"
            )
        if config.prefix_cache and self.needs_mass:
            raise ValueError(
                f"{self} ranks tokens by the attention that they received, which is not known of tokens "
                "found in a prefix cache; the cache has prefix_cache=True"
            )
        if config.layer_windows is not None and self.last_step() > config.max_chunk:
            raise ValueError(
                f"{self} observes the last {self.last_step()} tokens of a prompt in one step; the cache "
                f"takes at most max_chunk={config.max_chunk} a step"
            )
        kept, most = self.most_kept(config), self.capacity(config)
        if kept >= most:
            raise ValueError(f"{self} keeps {kept} of {most} token slots; there must be room for one more")
        if self.capacity(config) > config.max_tokens_per_seq:
            raise ValueError(
                f"{self} fills up to {self.capacity(config)} token slots (a page more than it keeps); a "
                f"sequence has {config.max_tokens_per_seq}: {config.max_pages_per_seq} pages of "
                f"{config.page_size}"
            )

    def first_values(self, config: CacheConfig) -> dict[str, Array]:
        """The initial `PolicyState.values`. Default: none."""
        return {}

    def view(self, batch: Batch) -> Batch:
        """The batch with the window and sink tokens of the policy. Default: the batch unchanged."""
        return batch

    def note(self, values: dict[str, Array], step: Step, batch: Batch) -> dict[str, Array]:
        """`PolicyState.values` after a step, if `needs_mass`. Default: unchanged."""
        return values

    def forget(self, values: dict[str, Array], slot: Int[Array, " entries"]) -> dict[str, Array]:
        """`PolicyState.values` after some sequences became shorter or empty. Default: unchanged.

        Values past the end of a sequence are never used, and may stay.
        """
        return values

    def is_due(self, cache: KVCache, slot: Int[Array, " entries"]) -> Bool[Array, " entries"]:
        """Whether `evict` has tokens to drop. Default: False, for a policy whose `evict` always succeeds.

        If it is still True after `evict`, `allocate` refuses the sequence with `OUT_OF_PAGES`.
        """
        return jnp.zeros(slot.shape, bool)

    def evict(self, cache: KVCache, slot: Int[Array, " entries"]) -> tuple[KVCache, Int[Array, " entries"]]:
        """Drops the tokens beyond the budget of some sequences, all or none of each sequence.

        It is called in every step, and must cost nothing where nothing is due: see
        `pallas_kernels.control_flow.only_if`.

        Args:
          cache: the cache, with this policy's state; no `Batch` of it may be in use.
          slot: each slot once; `max_seqs` for an entry to ignore.

        Returns:
          The cache, and the number of tokens dropped from each sequence.
        """
        raise NotImplementedError

    # `generate` calls these before anything is computed.

    def last_step(self) -> int:
        """Tokens at the end of a prompt that must be a step of their own, the only observed one.

        Default: 0; every step is observed.
        """
        return 0

    def most_at_once(self, config: CacheConfig, largest: int) -> int:
        """Most tokens of one prompt in a step of `largest`: they must fit its row beside what is kept."""
        return min(largest, config.max_tokens_per_seq - self.most_kept(config))

    def shared_unit(self, config: CacheConfig, largest: int) -> int:
        """Sharing a prefix of a multiple of this many tokens does not change what is evicted."""
        return math.lcm(config.page_size, self.most_at_once(config, largest))

    def copied_tokens(self, length: int) -> int:
        """Tokens that `evict` copies of a sequence whose pages are shared. Default: none."""
        return 0

    def last_position(self, config: CacheConfig, num_tokens: int, new_tokens: int, largest: int) -> int:
        """The highest position that a prompt and its continuation reach; arguments as for `token_slots`."""
        most = self.most_positions(config)
        return num_tokens + new_tokens if most is None else most + min(num_tokens, largest)

    def token_slots(self, config: CacheConfig, num_tokens: int, new_tokens: int, largest: int) -> int:
        """Most token slots that a prompt and its continuation fill.

        Args:
          config: a config whose row holds all tokens.
          num_tokens: of the prompt.
          new_tokens: most tokens to generate.
          largest: most tokens per prefill step.
        """
        most = self.most_kept(config) + min(num_tokens, largest)
        return max(self.capacity(config), min(num_tokens + new_tokens, most))


def count_evictions(stats: AllocationStats, dropped: Int[Array, " entries"]) -> AllocationStats:
    """Adds the tokens dropped from each sequence to the counters."""
    times, tokens = jnp.sum(dropped > 0, dtype=jnp.int32), jnp.sum(dropped, dtype=jnp.int32)
    return count(stats, evictions=times, evicted_tokens=tokens)


def check_counts(policy: Any, least: dict[str, int], budget: str | None = None) -> None:
    """Checks that integer settings reach their least value, and that the budget holds the tokens to keep."""
    for name, smallest in least.items():
        value = getattr(policy, name)
        number = whole(value)
        if number is None or not smallest <= number < 2**30:
            raise ValueError(f"{name}={value!r} must be an integer, {smallest} or more and below {2**30}")
        # As Python integers, so that equal policies have equal hashes and the same repr.
        object.__setattr__(policy, name, number)
    if budget is not None and getattr(policy, budget) > policy.budget:
        raise ValueError(f"budget={policy.budget} does not hold {budget}={getattr(policy, budget)} tokens")


def check_positions(positions: str, rope: Rope | None) -> None:
    """Checks that `positions` and `rope` match."""
    if positions not in get_args(Positions):
        raise ValueError(f"positions={positions!r} must be 'original' or 'cache'")
    if rope is not None and not isinstance(rope, Rope):
        raise ValueError(f"rope={rope!r} must be a jaxkv.Rope")
    if positions == "cache" and rope is None:
        raise ValueError(f"positions='cache' rotates keys and needs rope=jaxkv.Rope(...), not {rope!r}")
