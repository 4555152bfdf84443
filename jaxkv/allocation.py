"""Room for new tokens: free pages, and a copy of a shared tail page before its first write."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.arguments import whole
from jaxkv.config import CacheConfig
from jaxkv.entries import (
    DROP,
    check_call,
    lengths_of,
)
from jaxkv.fingerprint import Operation, stamp
from jaxkv.granting import Grant, Request, Tokens, decide, place_tokens, read_request
from jaxkv.layers import copy_within
from jaxkv.operation import REPLICATED, as_given, is_known, is_traced, operation
from jaxkv.ownership import count, forget, num_available, release
from jaxkv.releasing import release_windows
from jaxkv.state import AllocationStats, Batch, KVCache, KVPool, PageTable, PolicyState, Status
from pallas_kernels.control_flow import skip_where_idle


def allocate(
    cache: KVCache,
    seqs: Int[Array, " seqs"],
    num_tokens: Int[Array, " seqs"],
    *,
    total_tokens: int | None = None,
) -> tuple[KVCache, Batch]:
    """Makes room for `num_tokens[i]` more tokens of `seqs[i]` and counts them in.

        page_size 4, sequence A has 6 tokens, B is its fork, A wants 3 more:

        before   A [a b c d][e f . .]                      B shares both pages
        after    A [a b c d][e f 6 7][8 . . .]             B [a b c d][e f . .]
                            copied   fresh

    A sequence gets all of its pages, in all groups of layers, or none. Entries are served in order: from the
    first that finds too few free pages, every later entry that needs a page is refused too. A refused
    sequence is unchanged. The first write to a partly filled last page that others share goes to a copy.

    Two things are released before pages are counted, from each valid entry with tokens, even if it is then
    refused. Pages that a layer's window hides from all later tokens: judged by the position before the call,
    so that the tokens of this call can be taken back. With a policy, the tokens that it evicts, if the new
    ones do not fit the last page. An entry whose policy must copy tokens out of shared pages and finds no
    room is `OUT_OF_PAGES`; it holds back no other.

    Outside `jit` the cache that is returned shares the pool with the one given, as after a `fork`, unless a
    page was copied: a step that donates one of the two takes the other with it.

    Args:
      cache: the cache.
      seqs: slots; a negative one is padding. A slot may be named once a call.
      num_tokens: tokens to make room for, one element an entry. Where a layer has a window at most
        `config.max_chunk`.
      total_tokens: static length of the token axis, at least the sum of `num_tokens`; the rest is padding.
        Each value is compiled once. Default: `len(seqs)`, one token for each entry.

    Returns:
      The cache and the `Batch` that `append` and `attend` take. `batch.status` says what became of
      each entry.

    Raises:
      ValueError: for a wrong shape, dtype or `total_tokens`, at trace time.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2, page_size=4)
      >>> cache, batch = jaxkv.allocate(
      ...     jaxkv.init(config), jnp.array([0, 1]), jnp.array([5, 1]), total_tokens=6)
      >>> [jaxkv.Status(int(status)).name for status in batch.status]
      ['OK', 'OUT_OF_PAGES']
    """
    seqs, num_tokens = check_call(cache, seqs=seqs, num_tokens=num_tokens)
    total = _check_total(total_tokens, seqs.shape[0])
    evicts = cache.policy is not None and not cache.policy.rule.once
    if not evicts and not is_traced((cache, seqs, num_tokens)):
        # Nothing is donated here, so a program that returns the pool has to copy all of it.
        (table, stats, policy), batch, num_copies = _allocate_only(cache, seqs, num_tokens, total=total)
        if is_known(num_copies) and not num_copies:
            return replace(cache, table=table, stats=stats, policy=policy), batch
    return _allocate(cache, seqs, num_tokens, total=total)


@operation(results=lambda cache, *_: (as_given(cache), REPLICATED), static=("total",))
@jax.named_scope("jaxkv.allocate")
def _allocate(cache: KVCache, seqs: Array, num_tokens: Array, *, total: int) -> tuple[KVCache, Batch]:
    return _run(cache, seqs, num_tokens, total, copy_tails=True)[:2]


@operation(
    results=lambda cache, *_: (as_given((cache.table, cache.stats, cache.policy)), REPLICATED, REPLICATED),
    static=("total",),
)
@jax.named_scope("jaxkv.allocate")
def _allocate_only(
    cache: KVCache, seqs: Array, num_tokens: Array, *, total: int
) -> tuple[tuple[PageTable, AllocationStats, PolicyState | None], Batch, Array]:
    """All but the pool, right where no tail page is to be copied; and how many are."""
    cache, batch, num_copies = _run(cache, seqs, num_tokens, total, copy_tails=False)
    return (cache.table, cache.stats, cache.policy), batch, num_copies


def _run(
    cache: KVCache, seqs: Array, num_tokens: Array, total: int, *, copy_tails: bool
) -> tuple[KVCache, Batch, Array]:
    """The allocation; and how many tail pages are to be copied, which `copy_tails` does."""
    request = read_request(cache.config, *_at_least_two(seqs, num_tokens), total)
    cache, request = make_room(cache, request)
    table, grant = decide(cache, request, total)
    tokens = place_tokens(cache.config, grant, total)
    refused = (grant.status != Status.OK) & (grant.status != Status.PADDING)
    counted = jnp.stack([jnp.sum(grant.copies, axis=0, dtype=jnp.int32), refused.astype(jnp.int32)])
    num_copies, num_refused = jnp.sum(counted, axis=1, dtype=jnp.int32)
    pool = cache.pool
    if copy_tails:
        copy = partial(_copy_tails, grant=grant, config=cache.config)
        pool, table = skip_where_idle(num_copies > 0, copy, (pool, table))
    table = forget(_enter(table, grant, tokens), grant.leaves.reshape(-1))
    facts = grant.slot, grant.num_tokens, grant.first_page[0], grant.tail[0]
    table = stamp(table, Operation.ALLOCATE, grant.num_tokens > 0, *facts)
    taken = grant.taken.num_pages
    stats = count(
        cache.stats,
        cache.table,
        table,
        num_taken=taken,
        copy_on_write_copies=num_copies,
        refused_allocations=num_refused,
    )
    cache = replace(cache, pool=pool, table=table, stats=stats)
    return cache, _batch(cache, seqs, num_tokens, grant, tokens, total), num_copies


def make_room(cache: KVCache, request: Request) -> tuple[KVCache, Request]:
    """Releases what windows no longer show; evicts what is due from sequences that outgrow their tail page.

    Those of these that have to wait, for pages to put what they keep, are refused.
    """
    if cache.config.layer_windows is not None:
        grows = (request.status == Status.OK) & (request.num_tokens > 0)
        cache = release_windows(cache, jnp.where(grows, request.slot, cache.config.max_seqs))
    if cache.policy is None or cache.policy.rule.once:
        return cache, request
    config, rule = cache.config, cache.policy.rule
    room = -lengths_of(cache.table, request.slot, config) % config.page_size
    grows = (request.status == Status.OK) & (request.num_tokens > room)
    slot = jnp.where(grows, request.slot, config.max_seqs)
    cache, _ = rule.evict(cache, slot)
    status = jnp.where(grows & rule.is_due(cache, slot), Status.OUT_OF_PAGES, request.status)
    return cache, request._replace(status=status)


def _copy_tails(
    carry: tuple[KVPool, PageTable], grant: Grant, config: CacheConfig
) -> tuple[KVPool, PageTable]:
    """Each shared tail page that is written to, to a page of the entry's own."""
    pool, table = carry
    source, destination = (
        jnp.where(grant.copies, page, config.num_pages) for page in (grant.tail, grant.first_page)
    )
    pool = copy_within(pool, source.reshape(-1), destination.reshape(-1), config)
    return pool, release(table, source.reshape(-1))


def _enter(table: PageTable, grant: Grant, tokens: Tokens) -> PageTable:
    """New pages in their rows, and the tokens in lengths and positions."""
    return replace(
        table,
        pages=table.pages.at[tokens.row, tokens.column].set(tokens.page_ids, **DROP),
        lengths=table.lengths.at[grant.row].set(grant.length + grant.num_tokens[None], **DROP),
        positions=table.positions.at[grant.slot].set(grant.position + grant.num_tokens, **DROP),
    )


def _batch(cache: KVCache, seqs, num_tokens, grant: Grant, tokens: Tokens, total: int) -> Batch:
    config, table, entries = cache.config, cache.table, seqs.shape[0]
    status = grant.status[:entries]
    lengths = (grant.length + grant.num_tokens[None])[:, :entries]
    row_lengths = jnp.where(status[None] == Status.OK, lengths, 0)
    if config.groups[0].window is None:
        kv_lengths = row_lengths[0]
    else:
        kv_lengths = jnp.where(status == Status.OK, (grant.position + grant.num_tokens)[:entries], 0)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), grant.ends[:entries]])
    batch = Batch(
        seqs=seqs,
        num_tokens=num_tokens,
        status=status,
        query_starts=jnp.minimum(starts, total),
        kv_lengths=kv_lengths,
        positions=tokens.positions,
        row_lengths=row_lengths,
        page_ids=tokens.page_ids,
        offsets=tokens.offsets,
        num_free=num_available(table),
        fingerprint=table.fingerprint,
        config=config,
    )
    return batch if cache.policy is None else cache.policy.rule.view(batch)


def _at_least_two(seqs: Array, num_tokens: Array) -> tuple[Array, Array]:
    """A padding entry beside a lone one.

    XLA turns a scatter of one row into a slice update, moves reads of the table past it, and then must
    copy the table, though the row comes `after` the reads. Scatters of two rows stay scatters, in place.
    """
    missing = max(0, 2 - seqs.shape[0])
    return jnp.pad(seqs, (0, missing), constant_values=-1), jnp.pad(num_tokens, (0, missing))


def _check_total(total_tokens: int | None, num_entries: int) -> int:
    total = num_entries if total_tokens is None else whole(total_tokens)
    if total is None or total < 1:
        raise ValueError(f"total_tokens={total_tokens!r} must be a positive Python integer (it is static)")
    if num_entries * (total + 1) >= 2**30:
        raise ValueError(f"{num_entries} entries x {total} total_tokens overflow int32; split the call")
    return total
