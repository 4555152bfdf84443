"""Keeps the last tokens and the first few (StreamingLLM, arXiv:2309.17453)."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jaxkv.config import CacheConfig
from jaxkv.entries import full_rows, lengths_of, rows_of
from jaxkv.intact import limit_intact
from jaxkv.ownership import count
from jaxkv.policies.base import Policy, Positions, check_counts, check_positions, count_evictions
from jaxkv.positions import check_one_kind, check_rope, shift_positions
from jaxkv.releasing import drop_pages
from jaxkv.rope import Rope
from jaxkv.state import Batch, KVCache
from pallas_kernels.control_flow import only_if


@dataclass(frozen=True)
class SlidingWindow(Policy):
    """Keeps the last `window` tokens and always the first `sinks`.

        page_size 4, window 6, sinks 2:
        [s s . .][. . . .][. . a b][c d e f]   ->   [s s . .][. . a b][c d e f]     the second page is free

    A page is released when its last token leaves the window. Attention ignores tokens outside the window in
    pages that remain. No K or V moves. Most models fail without sinks once their first tokens are dropped,
    since attention that no other token needs goes to the first tokens.

    Attributes:
      window: tokens that each token attends to, itself included.
      sinks: first tokens of a sequence, which every token attends to in addition.
      positions: "original", or "cache": after `window` tokens were dropped, the remaining ones are moved to
        positions right after the sinks. Then positions stay below `sinks + 2 * window` plus three pages, and
        a sequence can grow without limit. A key is rotated at most twice.
      rope: how the model rotates its keys, for "cache".

    Raises:
      ValueError: for settings that contradict each other.

    Example:
      >>> from jaxkv import CacheConfig
      >>> config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=8, page_size=4)
      >>> SlidingWindow(window=8, sinks=2).capacity(config)
      16
    """

    name: ClassVar[str] = "sliding-window"

    window: int
    sinks: int = 4
    positions: Positions = field(default="original", kw_only=True)
    rope: Rope | None = field(default=None, kw_only=True)

    def __post_init__(self):
        check_counts(self, least={"window": 1, "sinks": 0})
        check_positions(self.positions, self.rope)

    @property
    def _window_kept(self) -> int:
        """The window, or 2 if it is 1: the newest token always stays, so that the slot is not empty."""
        return max(self.window, 2)

    def most_positions(self, config: CacheConfig) -> int | None:
        """`capacity` plus a window if positions are renumbered; else None."""
        return self.capacity(config) + self.window if self.positions == "cache" else None

    def most_kept(self, config: CacheConfig) -> int:
        """The sinks' pages and the window, which may begin anywhere in a page."""
        return (config.pages_for(self.sinks) + 1) * config.page_size + self._window_kept - 2

    def capacity(self, config: CacheConfig) -> int:
        """The sinks' pages, the window's pages and the page being filled."""
        window_pages = config.pages_for(self._window_kept - 1) + 1
        return (config.pages_for(self.sinks) + window_pages) * config.page_size

    def check(self, config: CacheConfig) -> None:
        """As `Policy.check`."""
        super().check(config)
        if self.positions == "cache":
            check_one_kind(config, "positions='cache'")
            check_rope(self.rope, config.head_dim)

    def view(self, batch: Batch) -> Batch:
        """The batch with this window and these sinks."""
        return replace(batch, window=self.window, sink_tokens=self.sinks)

    def shared_unit(self, config: CacheConfig, largest: int) -> int:
        """A page if positions stay: the window hides the same tokens whenever pages are released."""
        return config.page_size if self.positions == "original" else super().shared_unit(config, largest)

    def evict(self, cache: KVCache, slot: Array) -> tuple[KVCache, Array]:
        """Releases the pages that no later token can attend to; see `Policy.evict`."""
        config = cache.config
        first = config.pages_for(self.sinks)
        length = lengths_of(cache.table, slot, config)
        pages = jnp.maximum((length - self._window_kept + 1) // config.page_size - first, 0)
        cache = only_if(jnp.any(pages > 0), lambda cache: self._evict(cache, slot, pages, first), cache)
        return cache, pages * config.page_size

    def _evict(self, cache: KVCache, slot: Array, pages: Array, first: int) -> KVCache:
        config = cache.config
        row = full_rows(slot, config)
        entries = row.shape[0] // slot.shape[0]
        column, size = jnp.full_like(row, first), jnp.full_like(row, config.page_size)
        table = drop_pages(cache.table, row, column, jnp.tile(pages, entries), size, config)
        touched = jnp.where(pages > 0, slot, config.max_seqs)
        intact = jnp.full_like(slot, first * config.page_size)
        table = replace(table, prefixes=limit_intact(table.prefixes, touched, intact))
        stats = count_evictions(count(cache.stats, cache.table, table), pages * config.page_size)
        state = cache.policy
        assert state is not None
        # A cut must leave the window of the token that comes next.
        least = first * config.page_size + self.window - 1
        state = replace(state, least=state.least.at[touched].set(least, mode="drop"))
        cache = replace(cache, table=table, stats=stats, policy=state)
        if self.rope is None or self.positions == "original":
            return cache
        gap = rows_of(table.positions, slot) - lengths_of(table, slot, config)
        far = jnp.where(gap >= self.window, slot, -1)
        # If shared pages would need more free pages than there are, positions stay until the next call.
        return shift_positions(cache, far, -gap, rope=self.rope, first=first * config.page_size)[0]
