"""Rows of the page table: free, truncate, and walks over the pages of many rows. No K or V in sight."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.config import CacheConfig
from jaxkv.entries import (
    DROP,
    check_call,
    clean_slots,
    first_fault,
    page_sizes,
    pages_for,
    rows_of,
    table_rows,
)
from jaxkv.fingerprint import Operation, stamp
from jaxkv.intact import cut_intact
from jaxkv.operation import REPLICATED, as_given, operation
from jaxkv.ownership import count, release
from jaxkv.state import AllocationStats, KVCache, PageTable, PolicyState, Status
from pallas_kernels import control_flow
from pallas_kernels.ordering import after
from pallas_kernels.ragged import ragged_rows

# Table entries visited at a time by operations on whole rows. Short rows need one visit and no loop.
_CHUNK = 1024


def free(cache: KVCache, seqs: Int[Array, " seqs"]) -> KVCache:
    """Releases the pages of `seqs`; a page is free again when its last owner releases it.

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
    (seqs,) = check_call(cache, seqs=seqs)
    return truncate(cache, seqs, jnp.zeros_like(seqs))[0]


def truncate(
    cache: KVCache, seqs: Int[Array, " seqs"], lengths: Int[Array, " seqs"]
) -> tuple[KVCache, Int[Array, " seqs"]]:
    """Takes back the last tokens of sequences, as after rejected speculative tokens.

    Pages left empty are released. A length beyond the present one changes nothing. Of several lengths for one
    slot the smallest applies. The tokens of the last `allocate` can always be taken back, and where a layer
    has a window `CacheConfig.rollback` more. Any sequence can be cut to 0 tokens, which is `free`.

    Args:
      cache: the cache.
      seqs: slots; a negative one is padding.
      lengths: tokens that each sequence has afterwards, its next position; those that a policy dropped count.

    Returns:
      The cache and a `Status` for each entry: INVALID_SEQ for a slot beyond `max_seqs`, INVALID_LENGTH for a
      negative length, ROLLBACK_TOO_LONG where tokens would be needed that a window released or a policy
      dropped. Such a sequence is as it was. Cut to 0, a slot is empty, as after `free`.

    Raises:
      ValueError: for wrong shapes or dtypes, at trace time.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2, page_size=4)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([7]), total_tokens=7)
      >>> cache, status = jaxkv.truncate(cache, jnp.array([0]), jnp.array([3]))
      >>> int(status[0]), int(cache.table.lengths[0]), int(cache.table.num_free)
      (0, 3, 1)
    """
    table, stats, policy, status = _truncate(cache, *check_call(cache, seqs=seqs, lengths=lengths))
    return replace(cache, table=table, stats=stats, policy=policy), status


@operation(results=lambda cache, *_: (*as_given((cache.table, cache.stats, cache.policy)), REPLICATED))
def _truncate(
    cache: KVCache, seqs: Array, lengths: Array
) -> tuple[PageTable, AllocationStats, PolicyState | None, Array]:
    config, table = cache.config, cache.table
    asked = clean_slots(seqs, config.max_seqs, where=lengths >= 0, once=False)
    slot = clean_slots(asked, config.max_seqs)
    shortest = jnp.full(config.max_seqs, jnp.iinfo(jnp.int32).max, jnp.int32).at[asked].min(lengths, **DROP)
    shortest = jnp.minimum(table.positions, shortest)
    # From here on of every slot, named or not: that takes fewer operations than to write what is named.
    old = table.lengths.reshape(-1, config.max_seqs)
    # Of an empty sequence nothing is left in any group.
    new = jnp.where(shortest[None] == 0, 0, old - (table.positions - shortest)[None])
    refused = (shortest < table.positions) & (shortest > 0) & _is_gone(cache, new, shortest)
    new, positions = jnp.where(refused[None], old, new), jnp.where(refused, table.positions, shortest)
    cut = positions < table.positions
    every = jnp.arange(config.max_seqs, dtype=jnp.int32)
    # Behind tokens that were dropped or shifted, those to come are not where their text has them.
    in_place = jnp.where(cut & (positions == new[0]), every, config.max_seqs)
    table = _shorten(table, table_rows(slot, config).reshape(-1), new, config)
    table = replace(table, positions=positions, prefixes=cut_intact(table.prefixes, in_place, new[0]))
    table = stamp(table, Operation.TRUNCATE, cut, every, positions)
    policy = cache.policy
    if policy is not None:
        emptied = jnp.where(rows_of(positions, slot, 1) == 0, slot, config.max_seqs)
        policy = replace(
            policy,
            values=policy.rule.forget(policy.values, jnp.where(cut, every, config.max_seqs)),
            least=policy.least.at[emptied].set(0, **DROP),
        )
    status = first_fault(
        (seqs < 0, Status.PADDING),
        (seqs >= config.max_seqs, Status.INVALID_SEQ),
        (lengths < 0, Status.INVALID_LENGTH),
        (rows_of(refused, asked, False), Status.ROLLBACK_TOO_LONG),
    )
    return table, count(cache.stats, cache.table, table), policy, status


def _is_gone(cache: KVCache, lengths: Array, positions: Array) -> Bool[Array, " seqs"]:
    """Whether a sequence cut so far would need tokens that were released or rewritten.

    Args:
      cache: before the cut.
      lengths: `[groups, seqs]`, token slots in each row afterwards.
      positions: tokens of each sequence afterwards.
    """
    windows = jnp.asarray([[group.window or 0] for group in cache.config.groups], jnp.int32)
    # The first token that the next one attends to; the first that is stored.
    seen = jnp.maximum(positions[None] - windows + 1, 0)
    least = 1 if cache.policy is None else jnp.maximum(cache.policy.least, 1)[None]
    return jnp.any(jnp.where(windows > 0, positions[None] - lengths > seen, lengths < least), axis=0)


def _shorten(
    table: PageTable, row: Int[Array, " rows"], lengths: Int[Array, "groups seqs"], config: CacheConfig
) -> PageTable:
    """The table with new lengths, shorter in these rows; pages left empty are released, row after row."""
    size = page_sizes(config)
    old = pages_for(table.lengths.reshape(lengths.shape), size)
    kept = pages_for(lengths, size)
    counts, kept = rows_of((old - kept).reshape(-1), row), kept.reshape(-1)

    def give_back(table: PageTable, entry, place, nth):
        at = rows_of(row, entry, config.num_rows)
        column = rows_of(kept, at) + place
        page = rows_of(table.pages, (at, column), config.num_pages)
        pages = table.pages.at[after(at, page), column].set(config.num_pages, **DROP)
        return release(replace(table, pages=pages), page, nth)

    backwards = table.prefixes is not None
    table = for_each_page(give_back, table, counts, backwards=backwards)
    return replace(table, lengths=lengths.reshape(-1))


def for_each_page(
    body, table: PageTable, counts: Int[Array, " entries"], *, backwards: bool = False
) -> PageTable:
    """Folds `body(table, entry, place, nth)` over some pages of each entry's row, a chunk of them at a time.

    Args:
      body: takes the table and three int32 vectors: of each page its entry, `len(counts)` for padding; its
        place among those of the entry; and how many of the chunk come before it.
      table: the page table.
      counts: pages of each entry, no more than a row has. Where all rows fit one chunk no loop is compiled.
      backwards: whether each entry's last place comes first, so that the end of a chain of recorded pages is
        released before its beginning.
    """

    def run(table: PageTable, entry: Array, place: Array, nth: Array) -> PageTable:
        return body(table, entry, rows_of(counts, entry) - 1 - place if backwards else place, nth)

    entries, width = counts.shape[0], table.pages.shape[1]
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    if entries * width <= _CHUNK:
        entry, place = jnp.divmod(jnp.arange(entries * width, dtype=jnp.int32), width)
        nth = (ends - counts)[entry] + place
        return run(table, jnp.where(place < counts[entry], entry, entries), place, nth)
    nth = jnp.arange(_CHUNK, dtype=jnp.int32)

    def visit(chunk: Array, table: PageTable) -> PageTable:
        return run(table, *ragged_rows(ends, _CHUNK, chunk * _CHUNK), nth)

    return control_flow.fori_loop(0, (ends[-1] + _CHUNK - 1) // _CHUNK, visit, table)


def for_each_column(body, table: PageTable, num_columns: Int[Array, ""], entries: int) -> PageTable:
    """Folds `body(table, columns)` over the first columns of the table, some at a time, the last ones first.

    In contrast to `for_each_page` all rows are at the same columns at once, so that rows may trade pages.

    Args:
      body: takes the table and an int32 vector of columns; those past the table's last do nothing.
      table: the page table.
      num_columns: how many, counted from the first. At most one step: no loop is compiled.
      entries: rows that the body visits in a column, which say how many columns a step takes.
    """
    most = table.pages.shape[1]
    size = min(most, max(1, _CHUNK // entries))
    columns = jnp.arange(size, dtype=jnp.int32)
    if size == most:
        return body(table, columns)
    steps = (num_columns + size - 1) // size
    return control_flow.fori_loop(
        0, steps, lambda step, table: body(table, columns + (steps - 1 - step) * size), table
    )


def lengths(cache: KVCache) -> Int[Array, " seqs"]:
    """Token slots in use of each sequence, 0 for an empty one.

    Args:
      cache: the cache. It may be donated to a later call while the lengths are still wanted.

    Returns:
      int32 `[max_seqs]`, in tokens, of groups with full attention; where there are none, the tokens so far.
      After an eviction this is less than the sequence's position.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2, max_seqs=2)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([1]), jnp.array([3]), total_tokens=3)
      >>> jaxkv.lengths(cache).tolist()
      [0, 3]
    """
    # A copy: what `jit` hands through unchanged is the cache's own array, and goes when that is donated.
    table, config = cache.table, cache.config
    return jnp.copy(table.positions if config.groups[0].window else table.lengths[: config.max_seqs])
