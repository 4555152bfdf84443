"""Who owns which page: allocate, free, truncate. No K or V in sight, but for copy-on-write.

The cost of each function follows the batch and its pages, never the size of the pool: pages come
off a stack by rank (a running sum over the batch), and go back to it the same way. An index that
should do nothing is out of range (`num_pages`, `max_seqs`) and dropped.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.state import AllocationStats, Batch, KVCache, PageTable, Status
from pallas_kernels.copy_pages import copy_pages
from pallas_kernels.ragged import ragged_rows

# Table entries visited at a time by operations on whole rows. Short rows need one visit and no loop.
_CHUNK = 1024


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
    given, seqs, num_tokens = (seqs, num_tokens), *_at_least_two(seqs, num_tokens)
    config, table = cache.config, cache.table
    max_seqs, page_size, num_pages = config.max_seqs, config.page_size, config.num_pages

    ends = jnp.cumsum(jnp.clip(num_tokens, 0, total + 1), dtype=jnp.int32)
    slot = jnp.where(seqs < 0, max_seqs, seqs)
    length = rows_of(table.lengths, slot)
    status = jnp.select(
        [
            seqs < 0,
            ~is_first(slot, max_seqs),
            (num_tokens < 0) | (ends > total) & (num_tokens > 0),
            num_tokens > config.max_tokens_per_seq - length,
        ],
        [Status.PADDING, Status.INVALID_SEQ, Status.INVALID_LENGTH, Status.SEQUENCE_TOO_LONG],
        Status.OK,
    ).astype(jnp.int32)

    wants = (status == Status.OK) & (num_tokens > 0)
    owned = _pages_for(length, page_size)
    tail = table.pages.at[slot, length // page_size].get(mode="fill", fill_value=num_pages)
    copies = wants & (length % page_size > 0) & (rows_of(table.refcounts, tail) > 1)
    first_new = owned - copies.astype(jnp.int32)
    need = jnp.where(wants, _pages_for(length + num_tokens, page_size) - first_new, 0)
    last = jnp.cumsum(need, dtype=jnp.int32)
    refused = (need > 0) & (last > table.num_free)
    status = jnp.where(refused, Status.OUT_OF_PAGES, status)
    granted, copies = wants & ~refused, copies & ~refused
    added = jnp.where(granted, num_tokens, 0)

    # The n-th page an entry needs is page `last - need + n` from the top of the stack.
    top = table.num_free - 1
    entry, offset = ragged_rows(ends, total)
    real = rows_of(granted, entry, False)
    place = rows_of(length, entry) + offset
    column = place // page_size
    is_new = column >= rows_of(first_new, entry)
    taken = rows_of(table.free_pages, top - rows_of(last - need - first_new, entry) - column)
    page_ids = jnp.where(real, jnp.where(is_new, taken, rows_of(tail, entry)), num_pages)
    # A new page is entered in the table by the first token on it.
    opens = real & is_new & ((place % page_size == 0) | (offset == 0))
    row = jnp.where(opens, rows_of(slot, entry), max_seqs)
    position = rows_of(rows_of(table.positions, slot), entry) + offset
    copied_to = jnp.where(copies, rows_of(table.free_pages, top - last + need), num_pages)
    num_taken = jnp.sum(jnp.where(granted, need, 0), dtype=jnp.int32)
    table = replace(
        table,
        pages=table.pages.at[row, column].set(page_ids, mode="drop"),
        lengths=table.lengths.at[slot].add(added, mode="drop"),
        positions=table.positions.at[slot].add(added, mode="drop"),
        refcounts=table.refcounts.at[jnp.where(opens, page_ids, num_pages)].set(1, mode="drop"),
        num_free=table.num_free - num_taken,
    )
    num_free_at_peak = table.num_free
    # What is pushed depends on what was taken: that orders the two, and spares a copy of the stack.
    table = release_pages(table, jnp.where(copied_to < num_pages, tail, num_pages))
    k, v = copy_pages(cache.pool.k, cache.pool.v, tail, copied_to)
    stats = _count(
        cache.stats,
        num_taken=num_taken,
        num_released=table.num_free - num_free_at_peak,
        copy_on_write_copies=jnp.sum(copies, dtype=jnp.int32),
        refused_allocations=jnp.sum((status != Status.OK) & (status != Status.PADDING), dtype=jnp.int32),
    )
    cache = replace(cache, pool=replace(cache.pool, k=k, v=v), table=table, stats=stats)
    asked_seqs, asked_tokens = given
    entries = asked_seqs.shape[0]
    # A refused entry sees nothing, so its row is never read; filling it would cost a pass over all rows.
    rows = jnp.minimum(slot[:entries], max_seqs - 1)
    return cache, Batch(
        seqs=asked_seqs,
        num_tokens=asked_tokens,
        status=status[:entries],
        query_starts=jnp.minimum(jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:entries]]), total),
        kv_lengths=jnp.where(status == Status.OK, length + added, 0)[:entries],
        positions=jnp.where(real, position, 0),
        page_ids=page_ids,
        offsets=jnp.where(real, place % page_size, 0),
        page_table=table.pages.at[rows].get(mode="promise_in_bounds"),
    )


def free(cache: KVCache, seqs: Int[Array, " seqs"]) -> KVCache:
    """Gives the pages of `seqs` back; a page returns to the stack when its last owner lets go.

    Padding, empty slots, slots beyond `max_seqs` and a slot named again are passed over.

    Args:
      cache: the cache.
      seqs: slots.

    Returns:
      The cache, with these slots empty.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([1]))
      >>> int(jaxkv.free(cache, jnp.array([0, 0])).table.num_free)
      2
    """
    (seqs,) = check_vectors(seqs=seqs)
    return truncate(cache, seqs, jnp.zeros_like(seqs))


def truncate(cache: KVCache, seqs: Int[Array, " seqs"], lengths: Int[Array, " seqs"]) -> KVCache:
    """Shortens sequences, as after rejected speculative tokens; pages left empty are given back.

    A longer length than now and a negative one do nothing, nor do padding, empty slots and slots
    beyond `max_seqs`. Of several lengths for one slot the smallest holds.

    Args:
      cache: the cache.
      seqs: slots.
      lengths: token places to keep, one number an entry.

    Returns:
      The cache. Cut to zero, a slot is empty, as after `free`.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2, page_size=4)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([7]), total_tokens=7)
      >>> cache = jaxkv.truncate(cache, jnp.array([0]), jnp.array([3]))
      >>> int(cache.table.lengths[0]), int(cache.table.num_free)
      (3, 1)
    """
    seqs, lengths = check_vectors(seqs=seqs, lengths=lengths)
    config, table = cache.config, cache.table
    slot = jnp.where((seqs < 0) | (lengths < 0), config.max_seqs, seqs)
    old = rows_of(table.lengths, slot)
    new_lengths = table.lengths.at[slot].min(lengths, mode="drop")
    new = rows_of(new_lengths, slot)
    once = is_first(slot, config.max_seqs)
    cut = jnp.where(once, old - new, 0)
    kept = _pages_for(new, config.page_size)
    ends = jnp.cumsum(jnp.where(once, _pages_for(old, config.page_size) - kept, 0), dtype=jnp.int32)

    def give_back(table: PageTable, entry, place):
        row, column = rows_of(slot, entry, config.max_seqs), rows_of(kept, entry) + place
        page = table.pages.at[row, column].get(mode="fill", fill_value=config.num_pages)
        # The row depends on the page that was read: that orders the two, and spares a copy of the table.
        row = jnp.where(page < config.num_pages, row, config.max_seqs)
        pages = table.pages.at[row, column].set(config.num_pages, mode="drop")
        return release_pages(replace(table, pages=pages), page)

    num_free = table.num_free
    table = for_each_page(give_back, table, ends, seqs.shape[0] * config.max_pages_per_seq)
    positions = table.positions.at[slot].add(-cut, mode="drop")
    emptied = jnp.where(new == 0, slot, config.max_seqs)
    table = replace(table, lengths=new_lengths, positions=positions.at[emptied].set(0, mode="drop"))
    stats = _count(cache.stats, num_released=table.num_free - num_free)
    return replace(cache, table=table, stats=stats)


def release_pages(table: PageTable, page_ids: Int[Array, " entries"]) -> PageTable:
    """One owner lets go of each page named; those that nobody holds go to the stack, once.

    An id of `num_pages` is passed over; a page named twice loses two owners.
    """
    num_pages = table.refcounts.shape[0]
    refcounts = table.refcounts.at[page_ids].add(-1, mode="drop")
    dead = refcounts.at[page_ids].get(mode="fill", fill_value=1) == 0
    # Several entries may name one dead page. They write their numbers, below zero, where its count
    # was; the one that reads its own back pushes the page.
    mark = -1 - jnp.arange(page_ids.shape[0], dtype=jnp.int32)
    refcounts = refcounts.at[jnp.where(dead, page_ids, num_pages)].min(mark, mode="drop")
    pushes = dead & (refcounts.at[page_ids].get(mode="fill", fill_value=0) == mark)
    refcounts = refcounts.at[jnp.where(pushes, page_ids, num_pages)].set(0, mode="drop")
    rank = jnp.cumsum(pushes, dtype=jnp.int32)
    place = jnp.where(pushes, table.num_free + rank - 1, num_pages)
    return replace(
        table,
        refcounts=refcounts,
        free_pages=table.free_pages.at[place].set(page_ids, mode="drop"),
        num_free=table.num_free + rank[-1],
    )


def for_each_page(body, table: PageTable, ends: Int[Array, " entries"], most: int) -> PageTable:
    """Folds `body(table, entry, place)` over the pages of ragged rows, a chunk of them at a time.

    Args:
      body: takes the table and two int32 vectors; `entry` is `len(ends)` for padding.
      table: the page table.
      ends: inclusive running sum of pages an entry.
      most: a static bound of `ends[-1]`. At most one chunk: no loop is compiled.
    """
    size = min(most, _CHUNK)
    if most <= size:
        return body(table, *ragged_rows(ends, size))
    chunks = (ends[-1] + size - 1) // size
    return jax.lax.fori_loop(
        0, chunks, lambda chunk, table: body(table, *ragged_rows(ends, size, chunk * size)), table
    )


def rows_of(values: Array, index: Int[Array, "..."], fill: int = 0) -> Array:
    """`values[index]`, `fill` where the index is past the end."""
    return values.at[index].get(mode="fill", fill_value=fill)


def is_first(slot: Int[Array, " entries"], max_seqs: int) -> Bool[Array, " entries"]:
    """Whether an entry is the first to name its slot; never for a slot beyond `max_seqs`."""
    number = jnp.arange(slot.shape[0], dtype=jnp.int32)
    first = jnp.full(max_seqs, slot.shape[0], jnp.int32).at[slot].min(number, mode="drop")
    return rows_of(first, slot, -1) == number


def check_vectors(**vectors: Array) -> list[Array]:
    """int32 vectors of one length, or a `ValueError` naming the argument that is not."""
    arrays = {name: jnp.asarray(vector) for name, vector in vectors.items()}
    length = None
    for name, array in arrays.items():
        if array.ndim != 1 or array.shape[0] == 0 or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be a non-empty int32 vector, not {array.dtype}{list(array.shape)}")
        if length not in (None, array.shape[0]):
            raise ValueError(
                f"{' and '.join(arrays)} must be of one length, not {length} and {array.shape[0]}"
            )
        length = array.shape[0]
    return [array.astype(jnp.int32) for array in arrays.values()]


def _check_total(total_tokens: int | None, num_entries: int) -> int:
    total = num_entries if total_tokens is None else total_tokens
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        raise ValueError(f"total_tokens={total_tokens!r} must be a positive Python integer (it is static)")
    if num_entries * (total + 1) >= 2**30:
        raise ValueError(f"{num_entries} entries x {total} total_tokens overflow int32; split the call")
    return total


def _at_least_two(seqs: Array, num_tokens: Array) -> tuple[Array, Array]:
    """A padding entry beside a lone one.

    XLA turns a scatter of one row into a slice update, moves reads of the table past it, and then must
    copy the table. Scatters of two rows stay scatters, in place.
    """
    missing = max(0, 2 - seqs.shape[0])
    return jnp.pad(seqs, (0, missing), constant_values=-1), jnp.pad(num_tokens, (0, missing))


def _pages_for(num_tokens: Int[Array, " entries"], page_size: int) -> Int[Array, " entries"]:
    return (num_tokens + page_size - 1) // page_size


def _count(
    stats: AllocationStats, *, num_taken: Array | int = 0, num_released: Array | int = 0, **others: Array
) -> AllocationStats:
    """Adds to the counters; the peak is reached before pages are given back."""
    in_use = stats.current_pages + num_taken
    increments = dict(total_allocations=num_taken, total_deallocations=num_released, **others)
    return replace(
        stats,
        current_pages=in_use - num_released,
        peak_pages=jnp.maximum(stats.peak_pages, in_use),
        **{name: saturating_add(getattr(stats, name), amount) for name, amount in increments.items()},
    )


def saturating_add(counter: Int[Array, ""], amount: Int[Array, ""] | int) -> Int[Array, ""]:
    """Stops at the largest int32 instead of turning negative."""
    total = counter + amount
    return jnp.where(total < counter, jnp.iinfo(jnp.int32).max, total)
