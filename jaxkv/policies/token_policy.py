"""Eviction of single tokens: ranks the tokens of each sequence and moves the kept ones to its first slots."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxkv.config import CacheConfig
from jaxkv.entries import lengths_of, rows_of
from jaxkv.fingerprint import Operation, stamp
from jaxkv.layers import view, whole
from jaxkv.policies.base import Policy, Positions, check_counts, check_positions, count_evictions
from jaxkv.positions import check_one_kind, check_rope
from jaxkv.rewrite import (
    Layer,
    Rewrite,
    for_each_layer,
    numbers,
    own_pages,
    read_tokens,
    stored_as,
    write_tokens,
)
from jaxkv.rope import Rope
from jaxkv.state import KVCache, KVPool
from pallas_kernels.control_flow import only_if
from pallas_kernels.ordering import after


class Tokens(NamedTuple):
    """The tokens of some sequences in one layer, for `TokenPolicy.rank`.

    Attributes:
      values: of the policy's state, each `[entries, kv_heads, max_tokens]`; undefined past a length.
      keys: float32 `[entries, kv_heads, max_tokens, head_dim]` for a policy that reads keys; else None.
      indices: of each token slot, `[1, 1, max_tokens]`; 0 is a sequence's oldest token.
      lengths: token slots in use, `[entries, 1, 1]`.
    """

    values: dict[str, Array]
    keys: Float[Array, "entries kv_heads max_tokens head_dim"] | None
    indices: Int[Array, "1 1 max_tokens"]
    lengths: Int[Array, "entries 1 1"]


@dataclass(frozen=True)
class TokenPolicy(Policy):
    """Keeps the `budget` tokens of highest rank in each layer and KV head, in their order.

    A model's own window counts the tokens that are left. A subclass defines the rank:

      >>> import jax.numpy as jnp
      >>> from dataclasses import dataclass
      >>> @dataclass(frozen=True)
      ... class Thin(TokenPolicy):
      ...     "Keeps the first four tokens, half a budget of last ones, and every other one between."
      ...     def rank(self, tokens):
      ...         kept = (tokens.indices < 4) | (tokens.indices >= tokens.lengths - self.budget // 2)
      ...         return jnp.where(kept, 2, tokens.indices % 2)
      >>> Thin(budget=64).budget
      64

    Attributes:
      budget: tokens that a sequence keeps.
      positions: "original": kept tokens keep their positions, and new ones continue the sequence's.
        "cache": kept tokens are renumbered 0, 1, 2 ..., and `rope` rotates their keys accordingly, so that a
        sequence never exceeds the model's context.
      rope: how the model rotates its keys, for "cache".

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
        """A rank for each token slot, float32 or int32; of equal ranks the older token counts as higher."""
        raise NotImplementedError

    def most_positions(self, config: CacheConfig) -> int | None:
        """`capacity` if positions are renumbered; else None."""
        return self.capacity(config) if self.positions == "cache" else None

    def most_kept(self, config: CacheConfig) -> int:
        """The budget."""
        return self.budget

    def capacity(self, config: CacheConfig) -> int:
        """The budget, rounded up to the end of the next page."""
        return (self.budget // config.page_size + 1) * config.page_size

    def check(self, config: CacheConfig) -> None:
        """As `Policy.check`; also refuses to quantize rotated keys again at every eviction."""
        super().check(config)
        if self.positions == "cache":
            check_one_kind(config, "positions='cache'")
            check_rope(self.rope, config.head_dim)
            if config.quantization is not None and not self.once:
                raise ValueError(
                    f"{type(self).__name__}(positions='cache') would quantize the same keys again at every "
                    f"eviction; the cache has quantization={config.quantization!r}: use positions='original'"
                )

    def copied_tokens(self, length: int) -> int:
        """The tokens that it keeps."""
        return min(length, self.budget)

    def is_due(self, cache: KVCache, slot: Array) -> Array:
        """Whether the sequence exceeds the budget."""
        return lengths_of(cache.table, slot, cache.config) > self.budget

    def evict(self, cache: KVCache, slot: Array) -> tuple[KVCache, Array]:
        """Keeps `budget` tokens of each sequence that has more; see `Policy.evict`.

        A sequence's own pages are reused. Tokens kept of shared pages are copied to free pages. If too few
        are free, the sequence and later entries that need free pages keep all tokens for now.
        """
        due = self.is_due(cache, slot)
        slot = jnp.where(due, slot, cache.config.max_seqs)
        nothing = cache, jnp.zeros_like(slot)
        return only_if(jnp.any(due), lambda carry: self._evict(carry[0], slot), nothing)

    def _evict(self, cache: KVCache, slot: Array) -> tuple[KVCache, Array]:
        config = cache.config
        length = lengths_of(cache.table, slot, config)
        cache, rewrite = own_pages(cache, slot, jnp.zeros_like(slot), jnp.full_like(slot, self.budget))
        granted = rewrite.slot < config.max_seqs
        lengths_before = jnp.zeros(config.max_seqs, jnp.int32).at[slot].set(length, mode="drop")

        def visit(carry: tuple[KVPool, dict], layer: Layer, some: Rewrite) -> tuple[KVPool, dict]:
            return self._keep(*carry, layer, some, rows_of(lengths_before, some.slot)[:, None, None], config)

        state = cache.policy
        assert state is not None
        # Policies act on groups with full attention, whose shape is that of the first.
        pool = view(cache.pool, config, config.groups[0])
        pool, values = for_each_layer(visit, (pool, state.values), rewrite, config)
        least = state.least.at[rewrite.slot].set(self.budget, mode="drop")
        state = replace(state, values=self.forget(values, rewrite.slot), least=least)
        table, dropped = cache.table, jnp.where(granted, length - self.budget, 0)
        if self.positions == "cache":
            table = replace(table, positions=table.positions.at[rewrite.slot].add(-dropped, mode="drop"))
            table = stamp(table, Operation.SHIFT_POSITIONS, dropped > 0, rewrite.slot, -dropped)
        stats = count_evictions(cache.stats, dropped)
        return replace(cache, pool=whole(pool, config), table=table, stats=stats, policy=state), dropped

    def _keep(
        self, pool: KVPool, values: dict, layer: Layer, some: Rewrite, lengths: Array, config: CacheConfig
    ) -> tuple[KVPool, dict]:
        """Chooses the kept tokens in one layer of some sequences, and moves them to the front."""
        index = jnp.arange(config.max_tokens_per_seq, dtype=jnp.int32)[None, None]
        indices = jnp.broadcast_to(index, (some.slot.shape[0], config.num_kv_heads, index.shape[-1]))
        own = {name: rows_of(x, (some.slot, layer.number)) for name, x in values.items() if x.ndim == 4}

        def read(indices: Array) -> KVPool:
            return read_tokens(pool, layer.nth, some.old, indices)

        tokens = Tokens(own, self._keys(config, read, indices), index, lengths)
        rank = self.rank(tokens)
        lowest = -jnp.inf if jnp.issubdtype(rank.dtype, jnp.floating) else jnp.iinfo(rank.dtype).min
        rank = jnp.where(index < lengths, rank, lowest)
        _, kept = jax.lax.top_k(jnp.broadcast_to(rank, indices.shape), self.budget)
        kept = jnp.sort(kept.astype(jnp.int32), axis=-1)
        stored, own, before = self.gather(config, tokens, kept, read)
        if self.positions == "cache":
            stored = self._renumber(config, stored, before)
        targets = after(indices[..., : self.budget], *jax.tree.leaves(stored))
        pool = write_tokens(pool, layer.nth, some.new, targets, stored)
        changed = {
            name: values[name].at[some.slot, layer.number, :, : self.budget].set(x, mode="drop")
            for name, x in own.items()
        }
        return pool, values | changed

    def _keys(self, config: CacheConfig, read: Callable[[Array], KVPool], indices: Array) -> Array | None:
        if not self.reads_keys:
            return None
        row = read(indices)
        return numbers(config, row.k, row.k_scale)

    def gather(
        self,
        config: CacheConfig,
        tokens: Tokens,
        kept: Int[Array, "entries kv_heads budget"],
        read: Callable[[Array], KVPool],
    ) -> tuple[KVPool, dict[str, Array], Int[Array, "entries kv_heads budget"]]:
        """The remaining tokens as stored, the policy's values for them, and the indices of their keys.

        Default: the kept tokens, unchanged.

        Args:
          config: of the cache.
          tokens: as given to `rank`.
          kept: indices of token slots, ascending.
          read: returns what is stored at indices shaped like `kept`; zeros for the index `max_tokens`.
        """
        own = {name: jnp.take_along_axis(x, kept, axis=-1) for name, x in tokens.values.items()}
        return read(kept), own, kept

    def _renumber(self, config: CacheConfig, stored: KVPool, before: Array) -> KVPool:
        by = jnp.arange(self.budget, dtype=jnp.int32)[None, None] - before
        assert self.rope is not None
        keys = self.rope.shift(numbers(config, stored.k, stored.k_scale), by)
        k, k_scale = stored_as(config, keys, keys=True)
        rotated = replace(stored, k=k, k_scale=k_scale)
        # Keys that keep their position are not rounded again.
        return jax.tree.map(lambda new, old: where_tokens(by != 0, new, old), rotated, stored)


def where_tokens(mask: Array, one: Array, other: Array) -> Array:
    """`jnp.where` for a mask without the axes of a token's elements."""
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (one.ndim - mask.ndim)), one, other)
