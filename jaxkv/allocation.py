"""Room for new tokens: pages off the free stack, and a copy of a shared tail page before its first write."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.arguments import whole
from jaxkv.config import CacheConfig
from jaxkv.fingerprint import Operation, stamp
from jaxkv.operation import REPLICATED, as_given, operation
from jaxkv.pages import check_vectors, count, is_first, pages_for, release_pages, rows_of
from jaxkv.state import Batch, KVCache, KVPool, Status
from pallas_kernels.copy_pages import copy_pages
from pallas_kernels.ragged import ragged_rows


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

    All or nothing for each sequence, earlier entries first: from the first entry that finds too few
    free pages, every later entry that needs a page is refused too. A refused sequence is exactly as
    it was. The first write to a part-full tail page that others share goes to a copy.

    A cache with a policy evicts what is due first, from each valid entry whose tokens do not fit its tail
    page; what is given up is free for this call. It stands even if the entry is then refused. One that finds
    too few free pages for what it keeps of shared pages is `OUT_OF_PAGES`, and holds back no other.

    Args:
      cache: the cache.
      seqs: slots; a negative one is padding. A slot may be named once a call.
      num_tokens: tokens to make room for, one number an entry.
      total_tokens: static length of the token axis. Default: `len(seqs)`, plain decode.

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
    seqs, num_tokens = check_vectors(seqs=seqs, num_tokens=num_tokens)
    total = _check_total(total_tokens, seqs.shape[0])
    return _allocate(cache, seqs, num_tokens, total=total)


@operation(results=lambda cache, *_: (as_given(cache), REPLICATED), static=("total",))
@jax.named_scope("jaxkv.allocate")
def _allocate(cache: KVCache, seqs: Array, num_tokens: Array, *, total: int) -> tuple[KVCache, Batch]:
    request = _request(cache.config, *_at_least_two(seqs, num_tokens), total)
    cache, waits = _make_room(cache, request)
    table, num_pages, max_seqs = cache.table, cache.config.num_pages, cache.config.max_seqs
    grant = _decide(cache, request, waits)
    tokens = _place_tokens(cache, grant, total)
    row = jnp.where(tokens.opens, rows_of(grant.slot, tokens.entry), max_seqs)
    num_taken = jnp.sum(grant.num_pages, dtype=jnp.int32)
    taken = replace(
        table,
        pages=table.pages.at[row, tokens.column].set(tokens.page_ids, mode="drop"),
        lengths=table.lengths.at[grant.slot].add(grant.num_tokens, mode="drop"),
        positions=table.positions.at[grant.slot].add(grant.num_tokens, mode="drop"),
        refcounts=table.refcounts.at[jnp.where(tokens.opens, tokens.page_ids, num_pages)].set(1, mode="drop"),
        num_free=table.num_free - num_taken,
    )
    # What is pushed depends on what was taken: that orders the two, and spares a copy of the stack.
    top_page = rows_of(table.free_pages, grant.top)
    copied_to = jnp.where(grant.copies, top_page, num_pages)
    table = release_pages(taken, jnp.where(copied_to < num_pages, grant.tail, num_pages))
    first_page = jnp.where(grant.num_pages > 0, top_page, num_pages)
    facts = grant.slot, grant.num_tokens, first_page, grant.tail
    table = stamp(table, Operation.ALLOCATE, grant.num_tokens > 0, *facts)
    pool = cache.pool
    pages = copy_pages(
        pool.k,
        pool.v,
        grant.tail,
        copied_to,
        k_scales=pool.k_scale,
        v_scales=pool.v_scale,
        kv_format=cache.config.storage.name,
    )
    refused = (grant.status != Status.OK) & (grant.status != Status.PADDING)
    stats = count(
        cache.stats,
        num_taken=num_taken,
        num_released=table.num_free - taken.num_free,
        copy_on_write_copies=jnp.sum(grant.copies, dtype=jnp.int32),
        refused_allocations=jnp.sum(refused, dtype=jnp.int32),
    )
    cache = replace(cache, pool=KVPool(*pages), table=table, stats=stats)
    return cache, _batch(cache, seqs, num_tokens, grant, tokens, total)


class _Request(NamedTuple):
    """What each entry of an `allocate` asks for.

    Attributes:
      slot: `max_seqs` for padding.
      num_tokens: as asked for.
      ends: running sum of it.
      faults: what is wrong with an entry whatever the cache holds, as lists of masks and of a `Status` each.
    """

    slot: Array
    num_tokens: Array
    ends: Array
    faults: tuple[list[Array], list[Status]]


class _Grant(NamedTuple):
    """What each entry of an `allocate` gets; one of padding may stand beside a lone entry.

    Attributes:
      slot: `max_seqs` for padding.
      status: a `Status`.
      length: before the call.
      num_tokens, num_pages: granted; 0 for a refused entry.
      ends: running sum of the tokens asked for.
      tail: the page that the next token would go to, if it is part full.
      copies: whether that page is copied first.
      top: place on the free stack of the entry's first page; its others lie below.
      first_column: column of its row that the first of them goes to.
    """

    slot: Array
    status: Array
    length: Array
    num_tokens: Array
    num_pages: Array
    ends: Array
    tail: Array
    copies: Array
    top: Array
    first_column: Array


class _Tokens(NamedTuple):
    """Where each row of the token axis goes. `opens` marks the first token on a new page."""

    entry: Array
    real: Array
    place: Array
    column: Array
    page_ids: Array
    opens: Array


def _request(config: CacheConfig, seqs: Array, num_tokens: Array, total: int) -> _Request:
    ends = jnp.cumsum(jnp.clip(num_tokens, 0, total + 1), dtype=jnp.int32)
    slot = jnp.where(seqs < 0, config.max_seqs, seqs)
    wrong_length = (num_tokens < 0) | (ends > total) & (num_tokens > 0)
    faults = [seqs < 0, ~is_first(slot, config.max_seqs), wrong_length]
    return _Request(
        slot, num_tokens, ends, (faults, [Status.PADDING, Status.INVALID_SEQ, Status.INVALID_LENGTH])
    )


def _make_room(cache: KVCache, request: _Request) -> tuple[KVCache, Array | None]:
    """Evicts what is due from the sequences whose new tokens do not fit their tail page.

    Also says which of them have to wait, for pages to put what they keep. None without such a policy.
    """
    if cache.policy is None or cache.policy.rule.once:
        return cache, None
    config, rule = cache.config, cache.policy.rule
    room = -rows_of(cache.table.lengths, request.slot) % config.page_size
    wrong, _ = request.faults
    grows = ~jnp.any(jnp.stack(wrong), axis=0) & (request.num_tokens > room)
    slot = jnp.where(grows, request.slot, config.max_seqs)
    cache, _ = rule.evict(cache, slot)
    return cache, rule.is_due(cache, slot)


def _decide(cache: KVCache, request: _Request, waits: Array | None) -> _Grant:
    """Counts every need from the state before the call, and says who gets what."""
    config, table = cache.config, cache.table
    slot, num_tokens, ends, (wrong, reasons) = request
    length = rows_of(table.lengths, slot)
    if waits is not None:
        wrong, reasons = [*wrong, waits], [*reasons, Status.OUT_OF_PAGES]
    status = jnp.select(
        [*wrong, num_tokens > config.max_tokens_per_seq - length],
        [*reasons, Status.SEQUENCE_TOO_LONG],
        Status.OK,
    ).astype(jnp.int32)
    wants = (status == Status.OK) & (num_tokens > 0)
    tail = rows_of(table.pages, (slot, length // config.page_size), config.num_pages)
    copies = wants & (length % config.page_size > 0) & (rows_of(table.refcounts, tail) > 1)
    # A copy takes the place of the page it is made from.
    first_column = pages_for(length, config.page_size) - copies.astype(jnp.int32)
    need = jnp.where(wants, pages_for(length + num_tokens, config.page_size) - first_column, 0)
    # First come, first served: from the first entry that does not fit, none that needs a page does.
    last = jnp.cumsum(need, dtype=jnp.int32)
    refused = (need > 0) & (last > table.num_free)
    granted = wants & ~refused
    return _Grant(
        slot=slot,
        status=jnp.where(refused, Status.OUT_OF_PAGES, status),
        length=length,
        num_tokens=jnp.where(granted, num_tokens, 0),
        num_pages=jnp.where(granted, need, 0),
        ends=ends,
        tail=tail,
        copies=copies & granted,
        top=table.num_free - 1 - (last - need),
        first_column=first_column,
    )


def _place_tokens(cache: KVCache, grant: _Grant, total: int) -> _Tokens:
    """A place for each token. A new page is entered in the table by the first token on it."""
    page_size, num_pages = cache.config.page_size, cache.config.num_pages
    entry, offset = ragged_rows(grant.ends, total)
    real = rows_of(grant.num_tokens, entry) > 0
    place = rows_of(grant.length, entry) + offset
    column = place // page_size
    is_new = column >= rows_of(grant.first_column, entry)
    # The n-th page of an entry is the n-th from its top of the stack.
    new = rows_of(cache.table.free_pages, rows_of(grant.top + grant.first_column, entry) - column)
    return _Tokens(
        entry=entry,
        real=real,
        place=place,
        column=column,
        page_ids=jnp.where(real, jnp.where(is_new, new, rows_of(grant.tail, entry)), num_pages),
        opens=real & is_new & ((place % page_size == 0) | (offset == 0)),
    )


def _batch(cache: KVCache, seqs, num_tokens, grant: _Grant, tokens: _Tokens, total: int) -> Batch:
    config, table, entries = cache.config, cache.table, seqs.shape[0]
    status = grant.status[:entries]
    lengths = (grant.length + grant.num_tokens)[:entries]
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), grant.ends[:entries]])
    ahead = rows_of(table.positions, grant.slot) - grant.num_tokens - grant.length
    batch = Batch(
        seqs=seqs,
        num_tokens=num_tokens,
        status=status,
        query_starts=jnp.minimum(starts, total),
        kv_lengths=jnp.where(status == Status.OK, lengths, 0),
        positions=jnp.where(tokens.real, tokens.place + rows_of(ahead, tokens.entry), 0),
        page_ids=tokens.page_ids,
        offsets=jnp.where(tokens.real, tokens.place % config.page_size, 0),
        num_free=table.num_free,
        fingerprint=table.fingerprint,
        config=config,
    )
    return batch if cache.policy is None else cache.policy.rule.view(batch)


def _at_least_two(seqs: Array, num_tokens: Array) -> tuple[Array, Array]:
    """A padding entry beside a lone one.

    XLA turns a scatter of one row into a slice update, moves reads of the table past it, and then must
    copy the table. Scatters of two rows stay scatters, in place.
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
