"""First in, first out, but for a sequence's first tokens (StreamingLLM, arXiv:2309.17453)."""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jaxtyping import Array

from jaxkv.config import CacheConfig
from jaxkv.entries import full_rows, rows_of
from jaxkv.ownership import count
from jaxkv.pages import drop_pages
from jaxkv.policies.base import Policy, Positions, check_counts, check_positions, count_evictions
from jaxkv.positions import check_one_kind, check_rope, shift_positions
from jaxkv.rope import Rope
from jaxkv.state import Batch, KVCache
from pallas_kernels.control_flow import only_if


@dataclass(frozen=True)
class SlidingWindow(Policy):
    """Keeps the last `window` tokens and, for good, the first `sinks`.

        page_size 4, window 6, sinks 2:
        [s s . .][. . . .][. . a b][c d e f]   ->   [s s . .][. . a b][c d e f]     the page behind is free

    A page goes back to the stack the moment the last of its tokens leaves the window; attention does not see
    the others that have left it. No K or V moves. Without sinks most models break once their first tokens
    are gone, for they rest attention there that they have no use for.

    Attributes:
      window: tokens that a token sees, itself included.
      sinks: first tokens of a sequence that every token sees besides.
      positions: "original", or "cache": once a window's worth of tokens was dropped, what is left moves up
        to the sinks, so that positions stay below `sinks + 2 * window` and three pages, and a sequence can go
        on for ever. A key is turned twice at most.
      rope: how the model turns its keys, for "cache".

    Raises:
      ValueError: for settings that contradict each other.

    Example:
      >>> from jaxkv import CacheConfig
      >>> config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=8, page_size=4)
      >>> SlidingWindow(window=8, sinks=2).capacity(config)
      16
    """

    window: int
    sinks: int = 4
    positions: Positions = field(default="original", kw_only=True)
    rope: Rope | None = field(default=None, kw_only=True)

    def __post_init__(self):
        check_counts(self, least={"window": 1, "sinks": 0})
        check_positions(self.positions, self.rope)

    @property
    def _window_kept(self) -> int:
        """The newest token stays, though with a window of one no other sees it: the slot is not empty."""
        return max(self.window, 2)

    def most_positions(self, config: CacheConfig) -> int | None:
        """A window beyond the places, where what is left moves up."""
        return self.capacity(config) + self.window if self.positions == "cache" else None

    def most_kept(self, config: CacheConfig) -> int:
        """The sinks' pages and the window, wherever in a page it begins."""
        return (config.pages_for(self.sinks) + 1) * config.page_size + self._window_kept - 2

    def capacity(self, config: CacheConfig) -> int:
        """The sinks' pages, the window's, and the one that is being filled."""
        window_pages = config.pages_for(self._window_kept - 1) + 1
        return (config.pages_for(self.sinks) + window_pages) * config.page_size

    def check(self, config: CacheConfig) -> None:
        """As `Policy.check`."""
        super().check(config)
        if self.positions == "cache":
            check_one_kind(config, "positions='cache'")
            check_rope(self.rope, config.head_dim)

    def view(self, batch: Batch) -> Batch:
        """The batch; its tokens see the window and the sinks."""
        return replace(batch, window=self.window, sink_tokens=self.sinks)

    def shared_unit(self, config: CacheConfig, largest: int) -> int:
        """A page, where positions stay: a window hides the same tokens whenever it gives back their pages."""
        return config.page_size if self.positions == "original" else super().shared_unit(config, largest)

    def evict(self, cache: KVCache, slot: Array) -> tuple[KVCache, Array]:
        """Gives back the pages that no token to come can see; see `Policy.evict`."""
        config = cache.config
        first = config.pages_for(self.sinks)
        length = rows_of(cache.table.lengths, slot)
        pages = jnp.maximum((length - self._window_kept + 1) // config.page_size - first, 0)
        cache = only_if(jnp.any(pages > 0), lambda cache: self._evict(cache, slot, pages, first), cache)
        return cache, pages * config.page_size

    def _evict(self, cache: KVCache, slot: Array, pages: Array, first: int) -> KVCache:
        config = cache.config
        row = full_rows(slot, config)
        entries = row.shape[0] // slot.shape[0]
        column, size = jnp.full_like(row, first), jnp.full_like(row, config.page_size)
        table = drop_pages(cache.table, row, column, jnp.tile(pages, entries), size, config)
        stats = count_evictions(count(cache.stats, cache.table, table), pages * config.page_size)
        state = cache.policy
        assert state is not None
        # A cut must leave the window of the token that comes next.
        least = first * config.page_size + self.window - 1
        dropped = jnp.where(pages > 0, slot, config.max_seqs)
        state = replace(state, least=state.least.at[dropped].set(least, mode="drop"))
        cache = replace(cache, table=table, stats=stats, policy=state)
        if self.rope is None or self.positions == "original":
            return cache
        gap = rows_of(table.positions, slot) - rows_of(table.lengths, slot)
        far = jnp.where(gap >= self.window, slot, -1)
        # Where siblings hold all free pages it stays where it is until the next time.
        return shift_positions(cache, far, -gap, rope=self.rope, first=first * config.page_size)[0]
