"""Defragmentation: live pages to the lowest ids, in the order sequences read them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.pages import count, rows_of
from jaxkv.state import KVCache, PageTable

# Bytes of K and V that are lifted out of the pool at a time, at most (one page, if that is more).
_CHUNK_BYTES = 16 * 2**20


def should_compact(cache: KVCache) -> Bool[Array, ""]:
    """Whether holes make up more than `config.compaction_threshold` of the pool's used part.

    The used part ends with the highest live page; a hole is a free page below it.

    Returns:
      A boolean scalar, for `lax.cond` or the host. It looks at every page once.
    """
    live = cache.table.refcounts > 0
    number = jnp.arange(1, live.shape[0] + 1, dtype=jnp.int32)
    used = jnp.max(jnp.where(live, number, 0))
    holes = used - jnp.sum(live, dtype=jnp.int32)
    return holes.astype(jnp.float32) > cache.config.compaction_threshold * used.astype(jnp.float32)


def compact(cache: KVCache) -> tuple[KVCache, Int[Array, ""]]:
    """Moves live pages to the lowest ids and sorts the free stack.

        page ids        0  1  2  3  4  5
        before          B1 .  A0 A1 .  B0      A is sequence 0, B is 1
        after           A0 A1 B0 B1 .  .

    Each sequence's pages come in order, lower slots first; a shared page lies where its first reader
    has it. Contents, lengths and sharing stay as they are. Beyond the pool it needs memory for a chunk
    of pages (about 16 MiB) and for a few numbers a page, never a second pool.

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
    table, num_pages = cache.table, cache.config.num_pages
    target = _target_ids(table)
    k, v = _move(cache.pool.k, cache.pool.v, target, min(num_pages, _chunk_pages(cache)))
    live = table.refcounts > 0
    num_moved = jnp.sum(live & (target != jnp.arange(num_pages, dtype=jnp.int32)), dtype=jnp.int32)
    table = replace(
        table,
        pages=rows_of(target, table.pages, num_pages),
        refcounts=jnp.zeros_like(table.refcounts).at[target].set(table.refcounts, mode="drop"),
        free_pages=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),
    )
    stats = count(cache.stats, compactions=1, pages_moved=num_moved)
    return replace(cache, pool=replace(cache.pool, k=k, v=v), table=table, stats=stats), num_moved


def _target_ids(table: PageTable) -> Int[Array, " pages"]:
    """Where each live page goes: its rank among first mentions in the table. `num_pages` for the rest."""
    num_pages = table.refcounts.shape[0]
    mentions = table.pages.reshape(-1)
    number = jnp.arange(mentions.shape[0], dtype=jnp.int32)
    first = jnp.full(num_pages, mentions.shape[0], jnp.int32).at[mentions].min(number, mode="drop")
    is_first = rows_of(first, mentions, -1) == number
    rank = jnp.cumsum(is_first, dtype=jnp.int32) - 1
    target = jnp.full(num_pages, num_pages, jnp.int32)
    return target.at[jnp.where(is_first, mentions, num_pages)].set(rank, mode="drop")


def _chunk_pages(cache: KVCache) -> int:
    # A chunk is lifted together with the pages it displaces.
    return max(1, _CHUNK_BYTES // (2 * cache.config.page_bytes))


def _move(k: Array, v: Array, target: Int[Array, " pages"], chunk: int) -> tuple[Array, Array]:
    """Carries every live page to its target, `chunk` targets at a time.

    A target may hold a live page that has not moved yet. It trades places: the pages displaced by a
    chunk go to the places the chunk's pages leave, and are carried on from there when their turn comes.
    `place[page]` says where the page that began as `page` lies now.
    """
    num_pages = target.shape[0]
    number = jnp.arange(num_pages, dtype=jnp.int32)
    moves = (target < num_pages) & (target != number)
    # The page that is due at each target, for the targets whose page must move, lowest first.
    due = (
        jnp.full(num_pages, num_pages, jnp.int32)
        .at[jnp.where(moves, target, num_pages)]
        .set(number, mode="drop")
    )
    ends = jnp.cumsum(due < num_pages, dtype=jnp.int32)
    queue = jnp.full(num_pages, num_pages, jnp.int32)
    queue = queue.at[jnp.where(due < num_pages, ends - 1, num_pages)].set(number, mode="drop")

    def step(i, state):
        k, v, place, holder = state
        rank = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        to = rows_of(queue, rank, num_pages)
        page = rows_of(due, to, num_pages)
        source = rows_of(place, page, num_pages)
        # `to` is sorted. Displaced: a target whose content is not itself one of the chunk's pages.
        at = jnp.minimum(jnp.searchsorted(to, source, method="scan_unrolled").astype(jnp.int32), chunk - 1)
        inside = (to[at] == source) & (source < num_pages)
        stays = jnp.zeros(chunk, bool).at[jnp.where(inside, at, chunk)].set(True, mode="drop")
        displaced = rows_of(holder, jnp.where(stays, num_pages, to), num_pages)
        vacated = (source < num_pages) & ~inside
        # The n-th displaced target pairs with the n-th vacated place.
        leaves = (to < num_pages) & ~stays
        nth = jnp.where(vacated, jnp.cumsum(vacated, dtype=jnp.int32) - 1, chunk)
        place_of = jnp.full(chunk, num_pages, jnp.int32).at[nth].set(source, mode="drop")
        refuge = jnp.where(
            leaves, rows_of(place_of, jnp.cumsum(leaves, dtype=jnp.int32) - 1, num_pages), num_pages
        )
        refuge = jnp.where(displaced < num_pages, refuge, num_pages)

        read = jnp.concatenate([source, to])
        write = jnp.concatenate([to, refuge])
        k, v = (_permute(pages, read, write) for pages in (k, v))
        place = place.at[page].set(to, mode="drop").at[displaced].set(refuge, mode="drop")
        holder = holder.at[jnp.where(vacated, source, num_pages)].set(num_pages, mode="drop")
        holder = holder.at[to].set(page, mode="drop").at[refuge].set(displaced, mode="drop")
        return k, v, place, holder

    holder = jnp.where(target < num_pages, number, num_pages)
    chunks = (ends[-1] + chunk - 1) // chunk
    k, v, _, _ = jax.lax.fori_loop(0, chunks, step, (k, v, number, holder))
    return k, v


def _permute(pages: Array, read: Int[Array, " moves"], write: Int[Array, " moves"]) -> Array:
    """`pages[:, write] = pages[:, read]`, all reads before all writes; a write past the end is dropped."""
    return pages.at[:, write].set(pages.at[:, read].get(mode="clip"), mode="drop")
