"""Memory use of a cache: pages, tokens and bytes, what is unused and what sharing saves."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from jaxkv.config import CacheConfig
from jaxkv.entries import check_cache
from jaxkv.operation import REPLICATED, operation
from jaxkv.ownership import num_spanned, num_users
from jaxkv.pages import lengths
from jaxkv.state import AllocationStats, KVCache, PageTable, on_host
from jaxkv.units import common_unit, format_bytes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """The counts of `memory_profile`, int32 on the device. Properties compute the rest.

    On the host the properties are Python numbers, and wait for the device. For stacked profiles, as from a
    scan or `vmap`, they are NumPy arrays of one value per profile. Inside `jit` they are traced: pages and
    sequences int32, shares float32. Values that may exceed int32 (`tokens`, `unused_token_slots`, bytes) are
    float32 there, exact to seven digits, or int64 with JAX's 64-bit types on.

    Attributes:
      lengths: token slots of each sequence, in groups with full attention; where there are none, its tokens.
      row_lengths: token slots of each sequence in each group.
      num_used: pages that a sequence has.
      num_shared: pages that several sequences have.
      num_spanned: pages from the first to the last that is not free.
      num_stored: token slots in use, those of a shared page once, as far as its fullest owner reaches.
      num_slots: token slots of the pages in use.
      stats: the counters.
      config: of the cache.
      num_policy_bytes: bytes of the policy's state.
      num_reclaimable: pages that the index of prefixes alone holds.
    """

    lengths: Int[Array, " seqs"]
    row_lengths: Int[Array, "groups seqs"]
    num_used: Int[Array, ""]
    num_shared: Int[Array, ""]
    num_spanned: Int[Array, ""]
    num_stored: Int[Array, ""]
    num_slots: Int[Array, ""]
    stats: AllocationStats
    config: CacheConfig = field(metadata={"static": True})
    num_policy_bytes: int = field(default=0, metadata={"static": True})
    num_reclaimable: Int[Array, ""] | int = 0

    @property
    def active_seqs(self) -> int:
        """Sequences with tokens."""
        return _total(_number(self.lengths) > 0)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences; a shared token counts for each."""
        return _total(_wide(_number(self.lengths)))

    @property
    def stored_tokens(self) -> int:
        """Token slots in use; a shared one counts once."""
        return _number(self.num_stored)

    @property
    def physical_pages(self) -> int:
        """Pages in use; a shared one counts once."""
        return _number(self.num_used)

    @property
    def logical_pages(self) -> int:
        """Page table entries in use: a shared page counts once for each owner."""
        sizes = np.asarray([group.page_size for group in self.config.groups], np.int32)[:, None]
        return _total(_total(-(-_number(self.row_lengths) // sizes)))

    @property
    def shared_pages(self) -> int:
        """Pages with more than one owner."""
        return _number(self.num_shared)

    @property
    def reclaimable_pages(self) -> int:
        """Pages that no sequence uses, kept for prompts that begin alike; taken when free ones run out."""
        return _number(self.num_reclaimable)

    @property
    def free_pages(self) -> int:
        """Pages without an owner."""
        return self.config.num_pages - self.physical_pages - self.reclaimable_pages

    @property
    def holes(self) -> int:
        """Free pages before the last one that is not free."""
        return _number(self.num_spanned) - self.physical_pages - self.reclaimable_pages

    @property
    def unused_token_slots(self) -> int:
        """Token slots of owned pages that hold no token."""
        return self._owned_slots - _wide(self.stored_tokens)

    @property
    def fragmentation(self) -> float:
        """Share of the token slots of owned pages that hold no token."""
        return _share(self.unused_token_slots, self._owned_slots)

    @property
    def scatter(self) -> float:
        """Share of free pages among those up to the last one in use; `compact` makes it 0."""
        return _share(self.holes, _number(self.num_spanned))

    @property
    def usage(self) -> float:
        """Share of the pool's pages that are in use."""
        return self.physical_pages / self.config.num_pages

    @property
    def efficiency(self) -> float:
        """`tokens` per token slot of owned pages; 1 for an empty cache.

        Partly filled pages lower it, sharing raises it.
        """
        return _share(_total(_total(_wide(_number(self.row_lengths)))), self._owned_slots, of_nothing=1.0)

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token in all layers, with their scales, before any window releases them."""
        return sum(self.config.page_bytes // group.page_size for group in self.config.groups)

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool: K, V and their scales."""
        return self.config.pool_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use."""
        return _times(self.physical_pages, self.config.page_bytes)

    @property
    def free_bytes(self) -> int:
        """Bytes of the free pages."""
        return _times(self.free_pages, self.config.page_bytes)

    @property
    def reclaimable_bytes(self) -> int:
        """Bytes of the reclaimable pages."""
        return _times(self.reclaimable_pages, self.config.page_bytes)

    @property
    def page_table_bytes(self) -> int:
        """Bytes of the page table's rows, lengths, positions and fingerprint."""
        return self.config.page_table_bytes

    @property
    def allocator_bytes(self) -> int:
        """Bytes of the refcounts, the free stack and its size, and the index of prefixes."""
        return self.config.allocator_bytes

    @property
    def policy_bytes(self) -> int:
        """Bytes of the policy's state."""
        return self.num_policy_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all arrays of the cache, including the counters."""
        return self.config.estimated_memory_bytes() + self.policy_bytes

    @property
    def saved_pages(self) -> int:
        """Additional pages that the same sequences would own without sharing."""
        return self.logical_pages - self.physical_pages

    @property
    def saved_bytes(self) -> int:
        """Bytes of `saved_pages`."""
        return _times(self.saved_pages, self.config.page_bytes)

    @property
    def _owned_slots(self) -> int:
        return _wide(_number(self.num_slots))

    def as_dict(self) -> dict[str, Any]:
        """Every property and every counter by name."""
        names = [name for name, value in vars(type(self)).items() if isinstance(value, property)]
        values = {name: getattr(self, name) for name in names if name[0] != "_"}
        if isinstance(self.lengths, Tracer):
            # Values from the config alone are Python integers, which may be too large for `jit` to return.
            values = {name: float(x) if isinstance(x, int) else x for name, x in values.items()}
        return values | self.stats.as_dict()

    def report(self) -> str:
        """The profile as text, in aligned columns.

        Raises:
          ValueError: for stacked profiles, and inside `jit`.
        """
        if isinstance(self.lengths, Tracer) or np.ndim(self.lengths) != 1:
            raise ValueError(
                f"report() takes one profile, on the host; here lengths are {jax.typeof(self.lengths)}. "
                "Return the profile from jit, and take one of a stack with "
                "jax.tree.map(lambda x: x[i], profiles)"
            )
        config, slots = self.config, self._owned_slots
        unit = common_unit([self.total_bytes, self.saved_bytes])
        rows = [
            ("pool", f"{config.num_pages:,} pages", format_bytes(self.pool_bytes, unit)),
            (
                "  used",
                f"{self.physical_pages:,} pages",
                f"{format_bytes(self.used_bytes, unit)}, {self.usage:.1%}",
            ),
            *self._reclaimable_row(unit),
            ("  free", f"{self.free_pages:,} pages", format_bytes(self.free_bytes, unit)),
            (
                "page table",
                format_bytes(self.page_table_bytes, unit),
                f"{self.logical_pages:,} entries in use",
            ),
            (
                "allocator",
                format_bytes(self.allocator_bytes, unit),
                "refcounts and the free stack" + ", prefixes" * config.prefix_cache,
            ),
            *([("policy", format_bytes(self.policy_bytes, unit), "its state")] if self.policy_bytes else []),
            ("on the device", format_bytes(self.total_bytes, unit), "all of the above and the counters"),
            ("sequences", f"{self.active_seqs:,}", f"of {config.max_seqs:,} slots"),
            ("tokens", f"{self.tokens:,}", f"{self.stored_tokens:,} stored"),
            (
                "per token",
                format_bytes(self.bytes_per_token, unit),
                f"in {config.quantization or config.dtype}",
            ),
            (
                "fragmentation",
                f"{self.fragmentation:.1%}",
                f"{self.unused_token_slots:,} of {slots:,} owned token slots are unused",
            ),
            (
                "scatter",
                f"{self.scatter:.1%}",
                f"{self.holes:,} holes among the first {_number(self.num_spanned):,} pages",
            ),
            (
                "sharing saved",
                f"{self.saved_pages:,} pages",
                f"{format_bytes(self.saved_bytes, unit)}; pages shared: {self.shared_pages:,}",
            ),
            ("efficiency", f"{self.efficiency:.2f}", "tokens per owned token slot"),
        ]
        rows += [
            (name.replace("_", " "), f"{value:,}", "since init")
            for name, value in self.stats.as_dict().items()
            if config.prefix_cache or not name.startswith("prefix")
        ]
        return align(rows)

    def _reclaimable_row(self, unit: str) -> list[tuple[str, str, str]]:
        if not self.config.prefix_cache:
            return []
        pages = f"{self.reclaimable_pages:,} pages"
        return [("  reclaimable", pages, format_bytes(self.reclaimable_bytes, unit))]


def memory_profile(cache: KVCache) -> MemoryProfile:
    """Counts what the cache holds. May be called inside `jit`; reads the whole page table once.

    Args:
      cache: the cache. It may be donated later; the profile stays valid.

    Returns:
      The counts; `report()` makes them text.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4, page_size=4)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([6]), total_tokens=6)
      >>> cache, _ = jaxkv.fork(cache, jnp.array([0]), jnp.array([1]))
      >>> profile = jaxkv.memory_profile(cache)
      >>> profile.physical_pages, profile.logical_pages, profile.fragmentation
      (2, 4, 0.25)
    """
    check_cache(cache)
    return _memory_profile(cache)


@operation(results=lambda cache: REPLICATED)
def _memory_profile(cache: KVCache) -> MemoryProfile:
    table, config = cache.table, cache.config
    held, slots = _tokens_in_pages(table, config)
    users = num_users(table)
    return MemoryProfile(
        lengths=lengths(cache),
        # A copy: what `jit` hands through unchanged is the cache's own array, and goes when that is donated.
        row_lengths=jnp.copy(table.lengths).reshape(-1, config.max_seqs),
        num_used=jnp.sum(users > 0, dtype=jnp.int32),
        num_shared=jnp.sum(users > 1, dtype=jnp.int32),
        num_reclaimable=jnp.copy(table.num_reclaimable),
        num_spanned=num_spanned(table),
        num_stored=jnp.sum(held, dtype=jnp.int32),
        num_slots=jnp.sum(slots, dtype=jnp.int32),
        stats=AllocationStats(jnp.copy(cache.stats.counters)),
        config=cache.config,
        num_policy_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.policy)),
    )


def _tokens_in_pages(
    table: PageTable, config: CacheConfig
) -> tuple[Int[Array, " pages"], Int[Array, " pages"]]:
    """Token slots in use of each page, as far as its fullest owner reaches; and all slots of pages in use."""
    sizes = [group.page_size for group in config.groups for _ in range(config.max_seqs)]
    size = jnp.asarray(sizes, jnp.int32)[:, None]
    before = jnp.arange(config.num_columns, dtype=jnp.int32)[None] * size
    held = jnp.clip(table.lengths[:, None] - before, 0, size)
    none = jnp.zeros(config.num_pages, jnp.int32)
    all_of = jnp.where(held > 0, size, 0)
    held, all_of = (none.at[table.pages].max(values, mode="drop") for values in (held, all_of))
    return held, all_of


def unused_share(lengths: Iterable[int], page_size: int) -> float:
    """Share of token slots without a token, for sequences of these lengths without shared pages.

    Example:
      >>> unused_share([10, 6], page_size=8)
      0.3333333333333333
    """
    lengths = list(lengths)
    slots = sum(-(-length // page_size) * page_size for length in lengths)
    return _share(slots - sum(lengths), slots)


def align(rows: list[tuple[str, str, str]]) -> str:
    """Three columns: a name, a right-aligned figure, and a remark."""
    names, figures = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:<{names}}  {figure:>{figures}}  {remark}" for name, figure, remark in rows)


def _number(value: Any) -> Any:
    """A traced count unchanged; else a Python integer, or a NumPy int64 array for stacked profiles."""
    return value if isinstance(value, Tracer) else on_host(np.asarray(value, np.int64))


def _wide(value: Any) -> Any:
    """Converts a traced count whose product may exceed int32; host integers are wide enough."""
    if not isinstance(value, Tracer):
        return value
    return value.astype(jnp.int64 if jnp.result_type(int) == jnp.int64 else jnp.float32)


def _times(count: Any, factor: int) -> Any:
    wide = _wide(count)
    # JAX converts a Python integer factor to int32, which may be too small.
    traced_float = isinstance(wide, Tracer) and jnp.issubdtype(wide.dtype, jnp.floating)
    return wide * (float(factor) if traced_float else factor)


def _total(per_seq: Any) -> Any:
    """The sum over sequences."""
    if not isinstance(per_seq, Tracer):
        return on_host(np.sum(per_seq, axis=-1, dtype=np.int64))
    return jnp.sum(per_seq, axis=-1, dtype=jnp.int32 if per_seq.dtype == bool else per_seq.dtype)


def _share(part: Any, whole: Any, of_nothing: float = 0.0) -> Any:
    if isinstance(whole, Tracer):
        return jnp.where(whole == 0, of_nothing, part / jnp.maximum(whole, 1))
    if np.ndim(whole):
        return np.where(whole == 0, of_nothing, part / np.maximum(whole, 1))
    return part / whole if whole else of_nothing
