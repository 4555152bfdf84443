"""Defragmentation: live pages to the lowest ids, in the order sequences read them."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.entries import check_cache, rows_of
from jaxkv.fingerprint import Operation, stamp
from jaxkv.layers import move_within
from jaxkv.operation import REPLICATED, as_given, operation
from jaxkv.ownership import count, is_live, num_spanned, renumber
from jaxkv.state import KVCache, PageTable
from pallas_kernels.control_flow import only_if


def should_compact(cache: KVCache) -> Bool[Array, ""]:
    """Whether holes make up more than `config.compaction_threshold` of the pool's used part.

    The used part ends with the highest live page; a hole is a free page below it.

    Returns:
      A boolean scalar, for the host; inside `jit`, `maybe_compact` asks it. It looks at every page once.
    """
    check_cache(cache)
    return _should_compact(cache)


@operation(results=lambda cache: REPLICATED)
def _should_compact(cache: KVCache) -> Array:
    used = num_spanned(cache.table)
    holes = used - jnp.sum(is_live(cache.table), dtype=jnp.int32)
    return holes.astype(jnp.float32) > cache.config.compaction_threshold * used.astype(jnp.float32)


def compact(cache: KVCache) -> tuple[KVCache, Int[Array, ""]]:
    """Moves live pages to the lowest ids and sorts the free stack.

        page ids        0  1  2  3  4  5
        before          B1 .  A0 A1 .  B0      A is sequence 0, B is 1
        after           A0 A1 B0 B1 .  .

    Each sequence's pages come in order, lower slots first; a shared page lies where its first reader
    has it, and behind them lie recorded pages that no sequence has. Contents, lengths and sharing stay as
    they are. Beyond the pool it needs memory for a few integers a page, and on the `xla` backend for a chunk
    of pages (about 16 MiB), never a second pool.

    Returns:
      The cache and the number of live pages that changed their id.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0, 1]), jnp.array([1, 1]))
      >>> cache, num_moved = jaxkv.compact(jaxkv.free(cache, jnp.array([0])))
      >>> int(num_moved), int(cache.table.pages[1, 0])
      (1, 0)
    """
    check_cache(cache)
    return _compact(cache)


@operation(results=lambda cache: (as_given(cache), REPLICATED))
def _compact(cache: KVCache) -> tuple[KVCache, Array]:
    table, num_pages = cache.table, cache.config.num_pages
    target = _target_ids(table, num_pages)
    moved = is_live(table) & (target != jnp.arange(num_pages, dtype=jnp.int32))
    num_moved = jnp.sum(moved, dtype=jnp.int32)
    table = replace(renumber(table, target), pages=rows_of(target, table.pages, num_pages))
    table = stamp(table, Operation.COMPACT, jnp.ones(1, bool), num_moved[None])
    stats = count(cache.stats, compactions=1, pages_moved=num_moved)
    pool = move_within(cache.pool, target, cache.config)
    return replace(cache, pool=pool, table=table, stats=stats), num_moved


def maybe_compact(cache: KVCache) -> KVCache:
    """`compact` where `should_compact` says so, else the cache as it is; inside `jit`, without a copy.

    Call it where no `Batch` is in use, before `allocate`: a batch describes where pages lie.

    Returns:
      The cache; `stats.compactions` and `stats.pages_moved` say what was done.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0, 1]), jnp.array([1, 1]))
      >>> cache = jaxkv.maybe_compact(jaxkv.free(cache, jnp.array([0])))
      >>> int(cache.table.pages[1, 0]), int(jaxkv.maybe_compact(cache).stats.compactions)
      (0, 1)
    """
    check_cache(cache)
    return _maybe_compact(cache)


@operation(results=as_given)
def _maybe_compact(cache: KVCache) -> KVCache:
    return only_if(should_compact(cache), lambda cache: _compact(cache)[0], cache)


def _target_ids(table: PageTable, num_pages: int) -> Int[Array, " pages"]:
    """Where each live page goes: its rank among first mentions in the table. `num_pages` for the rest.

    Behind them come the pages that the index of prefixes alone holds, by their ids.
    """
    mentions = table.pages.reshape(-1)
    number = jnp.arange(mentions.shape[0], dtype=jnp.int32)
    first = jnp.full(num_pages, mentions.shape[0], jnp.int32).at[mentions].min(number, mode="drop")
    is_first = rows_of(first, mentions, -1) == number
    rank = jnp.cumsum(is_first, dtype=jnp.int32) - 1
    target = jnp.full(num_pages, num_pages, jnp.int32)
    target = target.at[jnp.where(is_first, mentions, num_pages)].set(rank, mode="drop")
    if table.prefixes is None:
        return target
    others = is_live(table) & (target == num_pages)
    behind = rank[-1] + jnp.cumsum(others, dtype=jnp.int32)
    return jnp.where(others, behind, target)
