"""What an eviction policy is.

A policy is a frozen dataclass of static settings with pure functions, to be called inside `jit`:

    state = policy.init(config)
    cache, state, num_dropped = policy.evict(cache, state, seqs)       # before allocate, on page boundaries
    cache, batch = jaxkv.allocate(cache, seqs, num_tokens)
    batch = policy.view(batch)
    ... append, attend in each layer, and attention_mass where `policy.needs_mass`
    state = policy.observe(state, cache, batch, mass)                  # mass of all layers, stacked
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.arguments import whole
from jaxkv.config import CacheConfig
from jaxkv.pages import check_vectors, count, is_first, rows_of
from jaxkv.rope import Rope
from jaxkv.state import AllocationStats, Batch, KVCache, PolicyState
from pallas_kernels import control_flow

Positions = Literal["original", "cache"]
_Carry = TypeVar("_Carry")


@dataclass(frozen=True)
class Policy:
    """What to forget. A class of your own needs `evict`, or is a `TokenPolicy` and needs `rank`.

    Class attributes:
      needs_mass: whether `observe` needs the attention that each token received.
      observe_last: how many of a prompt's last tokens it needs that of; None for every token there is.
    """

    needs_mass: ClassVar[bool] = False
    observe_last = None

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
        kept, most = self.most_kept(config), self.capacity(config)
        if kept >= most:
            raise ValueError(f"{self} keeps {kept} of {most} token places; there must be room for one more")
        if self.capacity(config) > config.max_tokens_per_seq:
            raise ValueError(
                f"{self} fills up to {self.capacity(config)} token places (a page more than it keeps); a "
                f"sequence has {config.max_tokens_per_seq}: {config.max_pages_per_seq} pages of "
                f"{config.page_size}"
            )

    def init(self, config: CacheConfig) -> PolicyState:
        """The state of a policy that has seen nothing yet.

        What a policy remembers of each token takes four bytes a place, layer and KV head of every row that
        the page table has: bound `max_pages_per_seq` to what `capacity` needs.

        Raises:
          ValueError: where the policy does not fit the cache.
        """
        if not isinstance(config, CacheConfig):
            raise ValueError(f"init takes a CacheConfig, not {type(config).__name__}")
        self.check(config)
        return PolicyState(self.first_values(config), self, config)

    def first_values(self, config: CacheConfig) -> dict[str, Array]:
        """Of `PolicyState.values`. Default: none."""
        return {}

    def view(self, batch: Batch) -> Batch:
        """The batch, with what its tokens may see. Default: everything."""
        return batch

    def observe(
        self,
        state: PolicyState,
        cache: KVCache,
        batch: Batch,
        mass: Float[Array, "layers entries kv_heads max_tokens"] | None = None,
    ) -> PolicyState:
        """Takes note of a step, after its attention. Default: of nothing.

        Args:
          state: of this policy.
          cache: as `allocate` returned it with `batch`, or after `append`.
          batch: of the step.
          mass: what `attention_mass` returned in each layer, stacked.
        """
        self.check_state(state, cache.config)
        return state

    def evict(
        self, cache: KVCache, state: PolicyState, seqs: Int[Array, " entries"]
    ) -> tuple[KVCache, PolicyState, Int[Array, " entries"]]:
        """Drops what is beyond the budget of some sequences, all of it or nothing for each.

        Args:
          cache: the cache; no `Batch` of it may be in use.
          state: of this policy.
          seqs: slots; padding, empty slots and a slot named again are passed over.

        Returns:
          The cache, the state, and how many token places each sequence gave up.
        """
        raise NotImplementedError

    def fork(
        self, state: PolicyState, parents: Int[Array, " entries"], children: Int[Array, " entries"]
    ) -> PolicyState:
        """What `jaxkv.fork` does to the cache: a child remembers what its parent does.

        Args:
          state: of this policy.
          parents, children: as given to `jaxkv.fork`; padding where it did not say OK.
        """
        self.check_state(state, getattr(state, "config", None))
        parents, children = check_vectors(parents=parents, children=children)
        nobody = state.config.max_seqs
        parent = jnp.where((parents < 0) | (children < 0), nobody, parents)
        child = jnp.where(parent == nobody, nobody, children)
        copied = jax.tree.map(lambda x: x.at[child].set(rows_of(x, parent), mode="drop"), state.values)
        return replace(state, values=copied)

    def check_state(self, state: PolicyState, config: CacheConfig | None) -> None:
        """Raises `ValueError` for the state of another policy or of another cache, naming both."""
        if not isinstance(state, PolicyState):
            raise ValueError(f"{self} takes the PolicyState that its init made, not {type(state).__name__}")
        if state.policy != self:
            raise ValueError(f"the state is of another policy: {state.policy}, not {self}")
        if state.config != config:
            raise ValueError(f"the state is of another cache: {state.config}, not {config}")


def only_if(condition: Bool[Array, ""], operation: Callable[[_Carry], _Carry], carry: _Carry) -> _Carry:
    """The operation, or nothing. In a loop of one trip or none: a branch would get a pool of its own."""
    return control_flow.fori_loop(0, condition.astype(jnp.int32), lambda _, carry: operation(carry), carry)


def named_once(seqs: Int[Array, " entries"], config: CacheConfig) -> Int[Array, " entries"]:
    """Slots, `max_seqs` for padding and for a slot named before."""
    slot = jnp.where(seqs < 0, config.max_seqs, seqs)
    return jnp.where(is_first(slot, config.max_seqs), slot, config.max_seqs)


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
