"""What an eviction policy is, and eviction of single tokens, which most policies share.

A policy is a frozen dataclass of static settings with pure functions, to be called inside `jit`:

    state = policy.init(config)
    cache, state, num_dropped = policy.evict(cache, state, seqs)       # before allocate, on page boundaries
    cache, batch = jaxkv.allocate(cache, seqs, num_tokens)
    batch = policy.view(batch)
    ... append, attend(..., return_mass=True) in each layer, or no mass where `policy.needs_mass` is False
    state = policy.observe(state, cache, batch, mass)                  # mass of all layers, stacked
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxkv.config import CacheConfig
from jaxkv.pages import check_vectors, count, is_first, rows_of
from jaxkv.positions import check_rope
from jaxkv.rewrite import Rewrite, for_each_layer, numbers, own_pages, read_tokens, stored_as, write_tokens
from jaxkv.rope import Rope
from jaxkv.state import AllocationStats, Batch, KVCache, KVPool, PolicyState

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
          mass: what `attend(..., return_mass=True)` returned in each layer, stacked.
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


class Tokens(NamedTuple):
    """The kept tokens of some sequences in one layer, for `TokenPolicy.rank`.

    Attributes:
      values: of the policy's state, each `[entries, kv_heads, max_tokens]`; past a length they mean nothing.
      keys: float32 `[entries, kv_heads, max_tokens, head_dim]`, for a policy that reads them; else None.
      place: `[max_tokens]`, 0 for a sequence's oldest.
      lengths: `[entries, 1, 1]`, token places in use.
    """

    values: dict[str, Array]
    keys: Float[Array, "entries kv_heads max_tokens head_dim"] | None
    place: Int[Array, " max_tokens"]
    lengths: Int[Array, "entries 1 1"]


@dataclass(frozen=True)
class TokenPolicy(Policy):
    """Keeps the `budget` tokens of highest rank, in each layer and KV head on its own, in their order.

    A window that the model has itself counts the places that are left.

    A class of your own says what ranks highest:

      >>> import jax.numpy as jnp
      >>> from dataclasses import dataclass
      >>> @dataclass(frozen=True)
      ... class Thin(TokenPolicy):
      ...     "Keeps the first four tokens and the last half of the budget, and of the rest every other one."
      ...     def rank(self, tokens):
      ...         kept = (tokens.place < 4) | (tokens.place >= tokens.lengths - self.budget // 2)
      ...         return jnp.where(kept, 2, tokens.place % 2)
      >>> Thin(budget=64).budget
      64

    Attributes:
      budget: token places a sequence keeps.
      positions: "original": the kept tokens stay at their positions, and new ones go on from the sequence's.
        "cache": they are numbered anew, 0, 1, 2 ..., and the keys turned to it by `rope`, so that a sequence
        never leaves the model's context.
      rope: how the model turns its keys, for "cache".

    Raises:
      ValueError: for settings that contradict each other.
    """

    budget: int
    positions: Positions = field(default="original", kw_only=True)
    rope: Rope | None = field(default=None, kw_only=True)

    reads_keys: ClassVar[bool] = False

    def __post_init__(self):
        check_counts(self, least={"budget": 1})
        check_positions(self.positions, self.rope)

    def rank(self, tokens: Tokens) -> Shaped[Array, "#entries #kv_heads max_tokens"]:
        """A number for each token place, float32 or int32; of equal ones the older token is the higher."""
        raise NotImplementedError

    def first_values(self, config: CacheConfig) -> dict[str, Array]:
        """Default: none."""
        return {}

    def most_positions(self, config: CacheConfig) -> int | None:
        """As many as places, where these are the positions."""
        return self.capacity(config) if self.positions == "cache" else None

    def most_kept(self, config: CacheConfig) -> int:
        """The budget."""
        return self.budget

    def capacity(self, config: CacheConfig) -> int:
        """The budget, and up to the end of the page after it."""
        return (self.budget // config.page_size + 1) * config.page_size

    def check(self, config: CacheConfig) -> None:
        """As `Policy.check`; and what is turned at every eviction must not be rounded to codes each time."""
        super().check(config)
        if self.positions == "cache":
            check_rope(self.rope, config.head_dim)
            if config.quantization is not None and self.observe_last is None:
                raise ValueError(
                    f"{type(self).__name__}(positions='cache') would quantize the same keys again at every "
                    f"eviction; the cache has quantization={config.quantization!r}: take positions='original'"
                )

    def evict(self, cache: KVCache, state: PolicyState, seqs: Array) -> tuple[KVCache, PolicyState, Array]:
        """Keeps `budget` tokens of each sequence that has more; see `Policy.evict`."""
        self.check_state(state, cache.config)
        (seqs,) = check_vectors(seqs=seqs)
        slot = named_once(seqs, cache.config)
        due = self.is_due(cache, state, slot)
        slot = jnp.where(due, slot, cache.config.max_seqs)
        nothing = cache, state, jnp.zeros_like(slot)
        return only_if(jnp.any(due), lambda carry: self._evict(carry[0], carry[1], slot), nothing)

    def is_due(self, cache: KVCache, state: PolicyState, slot: Array) -> Array:
        """Whether `evict` has something to do, for each slot."""
        return rows_of(cache.table.lengths, slot) > self.budget

    def _evict(self, cache: KVCache, state: PolicyState, slot: Array) -> tuple[KVCache, PolicyState, Array]:
        config = cache.config
        length = rows_of(cache.table.lengths, slot)
        cache, rewrite = own_pages(cache, slot, jnp.zeros_like(slot), jnp.full_like(slot, self.budget))
        granted = rewrite.slot < config.max_seqs
        lengths_before = jnp.zeros(config.max_seqs, jnp.int32).at[slot].set(length, mode="drop")

        def visit(carry: tuple[KVPool, dict], layer: Array, some: Rewrite) -> tuple[KVPool, dict]:
            return self._keep(*carry, layer, some, rows_of(lengths_before, some.slot)[:, None, None], config)

        pool, values = for_each_layer(visit, (cache.pool, state.values), rewrite, config)
        values = self.after_eviction(values, rewrite.slot)
        table, dropped = cache.table, jnp.where(granted, length - self.budget, 0)
        if self.positions == "cache":
            table = replace(table, positions=table.positions.at[rewrite.slot].add(-dropped, mode="drop"))
        cache = replace(cache, pool=pool, table=table, stats=count_evictions(cache.stats, dropped))
        return cache, replace(state, values=values), dropped

    def after_eviction(self, values: dict[str, Array], slot: Int[Array, " entries"]) -> dict[str, Array]:
        """`PolicyState.values` of the sequences that gave up tokens. Default: as they are."""
        return values

    def _keep(
        self, pool: KVPool, values: dict, layer: Array, some: Rewrite, lengths: Array, config: CacheConfig
    ) -> tuple[KVPool, dict]:
        """One layer of some sequences: which tokens stay, and their move to the front."""
        place = jnp.arange(config.max_tokens_per_seq, dtype=jnp.int32)
        everywhere = jnp.broadcast_to(place, (some.slot.shape[0], config.num_kv_heads, place.shape[0]))
        own = {name: rows_of(x, (some.slot, layer)) for name, x in values.items() if x.ndim == 4}

        def read(places: Array) -> KVPool:
            return read_tokens(pool, layer, some.old, places)

        tokens = Tokens(own, self._keys(config, read, everywhere), place, lengths)
        rank = self.rank(tokens)
        lowest = -jnp.inf if jnp.issubdtype(rank.dtype, jnp.floating) else jnp.iinfo(rank.dtype).min
        rank = jnp.where(place < lengths, rank, lowest)
        _, kept = jax.lax.top_k(jnp.broadcast_to(rank, everywhere.shape), self.budget)
        kept = jnp.sort(kept.astype(jnp.int32), axis=-1)
        stored, own, stood = self.gather(config, tokens, kept, read)
        if self.positions == "cache":
            stored = self._renumber(config, stored, stood)
        pool = write_tokens(pool, layer, some.new, everywhere[..., : self.budget], stored)
        changed = {
            name: values[name].at[some.slot, layer, :, : self.budget].set(x, mode="drop")
            for name, x in own.items()
        }
        return pool, values | changed

    def _keys(self, config: CacheConfig, read: Callable[[Array], KVPool], places: Array) -> Array | None:
        if not self.reads_keys:
            return None
        row = read(places)
        return numbers(config, row.k, row.k_scale)

    def gather(
        self,
        config: CacheConfig,
        tokens: Tokens,
        kept: Int[Array, "entries kv_heads budget"],
        read: Callable[[Array], KVPool],
    ) -> tuple[KVPool, dict[str, Array], Int[Array, "entries kv_heads budget"]]:
        """The tokens that are left, as they are stored; what the state remembers of them; where keys stood.

        Default: those at the places kept, as they are.

        Args:
          config: of the cache.
          tokens: as `rank` had them.
          kept: places, ascending.
          read: gives what is stored at places like `kept`; zeros for a place of `max_tokens`.
        """
        own = {name: jnp.take_along_axis(x, kept, axis=-1) for name, x in tokens.values.items()}
        return read(kept), own, kept

    def _renumber(self, config: CacheConfig, stored: KVPool, stood: Array) -> KVPool:
        by = jnp.arange(self.budget, dtype=jnp.int32) - stood
        assert self.rope is not None
        turned = self.rope.turn(numbers(config, stored.k, stored.k_scale), by)
        k, k_scale = stored_as(config, turned, keys=True)
        turned = replace(stored, k=k, k_scale=k_scale)
        # What stays at its place is not rounded once more.
        return jax.tree.map(lambda new, old: where_tokens(by != 0, new, old), turned, stored)


def only_if(condition: Bool[Array, ""], operation: Callable[[_Carry], _Carry], carry: _Carry) -> _Carry:
    """The operation, or nothing. In a loop of one trip or none: a branch would get a pool of its own."""
    return jax.lax.fori_loop(0, condition.astype(jnp.int32), lambda _, carry: operation(carry), carry)


def where_tokens(mask: Array, one: Array, other: Array) -> Array:
    """`jnp.where` for a mask without the axes of a token's numbers."""
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (one.ndim - mask.ndim)), one, other)


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
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < 2**30:
            raise ValueError(f"{name}={value!r} must be an integer, {smallest} or more and below {2**30}")
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
