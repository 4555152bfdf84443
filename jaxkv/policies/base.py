"""What an eviction policy is.

A policy is a frozen dataclass of static settings. `jaxkv.init(config, policy)` makes it part of a cache, and
`cache.policy.values` is what it remembers:

    cache, batch = jaxkv.allocate(cache, seqs, num_tokens)     # evicts what is due first
    ... append and attend in each layer, and attention_mass where `policy.needs_mass`
    cache = jaxkv.observe(cache, batch, mass)                  # mass of all layers, stacked

These functions call the policy's methods, inside `jit`. `jaxkv.generate` also asks it how to cut up prompts.
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
    """One step of some sequences, as a policy sees it; arrays for token slots have four axes.

    Attributes:
      slot: of each entry, `max_seqs` for padding and for refused ones.
      mass: `[entries, layers, kv_heads, max_tokens]`.
      is_new, is_old: `[entries, 1, 1, max_tokens]`, the step's own tokens and those before them.
      place: `[1, 1, 1, max_tokens]`.
    """

    slot: Int[Array, " entries"]
    mass: Float[Array, "entries layers kv_heads max_tokens"]
    is_new: Bool[Array, "entries 1 1 max_tokens"]
    is_old: Bool[Array, "entries 1 1 max_tokens"]
    place: Int[Array, "1 1 1 max_tokens"]


@dataclass(frozen=True)
class Policy:
    """What to forget. A class of your own needs `evict`, or is a `TokenPolicy` and needs `rank`.

    Class attributes:
      needs_mass: whether `note` needs the attention that each token received.
      once: whether it cuts a prompt once, where `jaxkv.evict` is called: `allocate` evicts nothing then, and
        what is generated need not be observed.
    """

    needs_mass: ClassVar[bool] = False
    once: ClassVar[bool] = False

    def capacity(self, config: CacheConfig) -> int:
        """Token places that a sequence fills at most, where `evict` is called whenever it fills a page.

        Default: a whole row.
        """
        return config.max_tokens_per_seq

    def most_positions(self, config: CacheConfig) -> int | None:
        """Positions that a decode loop reaches at most; None for as many as there are tokens."""
        return None

    def most_kept(self, config: CacheConfig) -> int:
        """Token places that `evict` leaves a sequence, at most. Default: a page less than `capacity`."""
        return self.capacity(config) - config.page_size

    def check(self, config: CacheConfig) -> None:
        """Raises `ValueError` where the policy does not fit the cache, naming both sides."""
        shapes = {group.shape for group in config.groups if group.window is None}
        if len(shapes) != 1:
            found = "has none" if not shapes else f"has layers of {len(shapes)} shapes"
            raise ValueError(
                f"{self} acts on layers with full attention, all of one shape; the cache {found}"
            )
        kept, most = self.most_kept(config), self.capacity(config)
        if kept >= most:
            raise ValueError(f"{self} keeps {kept} of {most} token places; there must be room for one more")
        if self.capacity(config) > config.max_tokens_per_seq:
            raise ValueError(
                f"{self} fills up to {self.capacity(config)} token places (a page more than it keeps); a "
                f"sequence has {config.max_tokens_per_seq}: {config.max_pages_per_seq} pages of "
                f"{config.page_size}"
            )

    def first_values(self, config: CacheConfig) -> dict[str, Array]:
        """`PolicyState.values` of a policy that has seen nothing yet. Default: none."""
        return {}

    def view(self, batch: Batch) -> Batch:
        """The batch, with what its tokens may see. Default: everything."""
        return batch

    def note(self, values: dict[str, Array], step: Step, batch: Batch) -> dict[str, Array]:
        """`PolicyState.values` after a step, where `needs_mass`. Default: as they are."""
        return values

    def forget(self, values: dict[str, Array], slot: Int[Array, " entries"]) -> dict[str, Array]:
        """`PolicyState.values` after some sequences became shorter or empty. Default: as they are.

        What is held for a token slot past the end of its sequence means nothing, and may stay.
        """
        return values

    def is_due(self, cache: KVCache, slot: Int[Array, " entries"]) -> Bool[Array, " entries"]:
        """Whether `evict` has something to drop. Default: never, where nothing keeps `evict` from dropping.

        A sequence for which it is so after `evict` waits: `allocate` refuses it with `OUT_OF_PAGES`.
        """
        return jnp.zeros(slot.shape, bool)

    def evict(self, cache: KVCache, slot: Int[Array, " entries"]) -> tuple[KVCache, Int[Array, " entries"]]:
        """Drops what is beyond the budget of some sequences, all of it or nothing for each.

        It is called in every step, and must cost nothing where nothing is due: see
        `pallas_kernels.control_flow.only_if`.

        Args:
          cache: the cache, with this policy's state; no `Batch` of it may be in use.
          slot: each slot once; `max_seqs` for an entry that does nothing.

        Returns:
          The cache, and how many token slots each sequence gave up.
        """
        raise NotImplementedError

    # What `generate` asks before anything is computed.

    def last_step(self) -> int:
        """Tokens at the end of a prompt that must be a step of their own, the only one that is observed.

        Default: 0, where every step is observed.
        """
        return 0

    def most_at_once(self, config: CacheConfig, largest: int) -> int:
        """Tokens of one prompt in a step of `largest` tokens: beside what it keeps they must fit its row."""
        return min(largest, config.max_tokens_per_seq - self.most_kept(config))

    def shared_unit(self, config: CacheConfig, largest: int) -> int:
        """Prompts that begin alike are evicted from as each alone would be at multiples of so many tokens."""
        return math.lcm(config.page_size, self.most_at_once(config, largest))

    def copied_tokens(self, length: int) -> int:
        """Token slots that `evict` writes anew of a sequence whose pages siblings share. Default: none."""
        return 0

    def last_position(self, config: CacheConfig, num_tokens: int, new_tokens: int, largest: int) -> int:
        """The position that a prompt and its continuation reach at most; arguments as of `token_slots`."""
        most = self.most_positions(config)
        return num_tokens + new_tokens if most is None else most + min(num_tokens, largest)

    def token_slots(self, config: CacheConfig, num_tokens: int, new_tokens: int, largest: int) -> int:
        """Token slots that a prompt and what it is continued with fill at most.

        Args:
          config: of a row that would hold everything.
          num_tokens: of the prompt.
          new_tokens: most tokens to be generated.
          largest: most tokens a prefill step.
        """
        most = self.most_kept(config) + min(num_tokens, largest)
        return max(self.capacity(config), min(num_tokens + new_tokens, most))


def count_evictions(stats: AllocationStats, dropped: Int[Array, " entries"]) -> AllocationStats:
    """Adds what sequences gave up to the counters."""
    times, tokens = jnp.sum(dropped > 0, dtype=jnp.int32), jnp.sum(dropped, dtype=jnp.int32)
    return count(stats, evictions=times, evicted_tokens=tokens)


def check_counts(policy: Any, least: dict[str, int], budget: str | None = None) -> None:
    """Integer settings, no less than they may be; and a budget that holds what must be kept."""
    for name, smallest in least.items():
        value = getattr(policy, name)
        number = whole(value)
        if number is None or not smallest <= number < 2**30:
            raise ValueError(f"{name}={value!r} must be an integer, {smallest} or more and below {2**30}")
        # As Python's own, so that policies of equal settings have equal hashes and texts.
        object.__setattr__(policy, name, number)
    if budget is not None and getattr(policy, budget) > policy.budget:
        raise ValueError(f"budget={policy.budget} does not hold {budget}={getattr(policy, budget)} tokens")


def check_positions(positions: str, rope: Rope | None) -> None:
    """`positions` and `rope` that fit together."""
    if positions not in get_args(Positions):
        raise ValueError(f"positions={positions!r} must be 'original' or 'cache'")
    if rope is not None and not isinstance(rope, Rope):
        raise ValueError(f"rope={rope!r} must be a jaxkv.Rope")
    if positions == "cache" and rope is None:
        raise ValueError(f"positions='cache' turns keys and needs rope=jaxkv.Rope(...), not {rope!r}")
