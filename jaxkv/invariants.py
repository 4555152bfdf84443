"""Host-side checks: is the cache sound, did a call succeed."""

import jax
import numpy as np

from jaxkv.config import CacheConfig
from jaxkv.entries import check_cache
from jaxkv.errors import (
    CacheCorruptedError,
    InvalidLengthError,
    InvalidSequenceError,
    JaxKVError,
    OutOfPagesError,
    RequestTableFullError,
    RollbackTooLongError,
    SequenceTooLongError,
    SlotOccupiedError,
)
from jaxkv.prefix_invariants import check_index, recorded_pages
from jaxkv.prefix_sizes import index_shapes
from jaxkv.state import Batch, KVCache, Status

_ERRORS = {
    Status.OUT_OF_PAGES: (OutOfPagesError, "the pool has too few free pages"),
    Status.SEQUENCE_TOO_LONG: (SequenceTooLongError, "the sequence would outgrow its row of the page table"),
    Status.INVALID_SEQ: (
        InvalidSequenceError,
        "the slot is beyond max_seqs, named earlier in the call, or an empty parent",
    ),
    Status.OCCUPIED: (SlotOccupiedError, "the child slot is in use"),
    Status.INVALID_LENGTH: (
        InvalidLengthError,
        "num_tokens or the length is negative, or more than one call takes",
    ),
    Status.ROLLBACK_TOO_LONG: (
        RollbackTooLongError,
        "the cut would need tokens that were released or rewritten",
    ),
    Status.TABLE_FULL: (RequestTableFullError, "the request table has too few empty rows"),
}


def refusal(status: Status) -> JaxKVError:
    """The error of a status that is neither OK nor PADDING, without the entry that it is of."""
    kind, text = _ERRORS[status]
    return kind(text)


def raise_for_status(batch_or_status: Batch | jax.Array | np.ndarray) -> None:
    """Raises for the first entry that is neither OK nor PADDING. Host side: it waits for the device.

    Args:
      batch_or_status: what `allocate`, `fork`, `reorder`, `truncate` or `serving.submit` returned, or an
        array of `Status`. They may be stacked, as `scan` and `vmap` do; an entry is then named by its whole
        index, step first.

    Raises:
      JaxKVError: the error of the entry's status (see `jaxkv.errors`), with the entry and, from a `Batch`,
        its slot, what it asked for and what there was.

    Example:
      >>> import jaxkv, numpy as np
      >>> jaxkv.raise_for_status(np.array([0, 5]))
      >>> jaxkv.raise_for_status(np.array([0, 1]))
      Traceback (most recent call last):
      jaxkv.errors.OutOfPagesError: entry 1: the pool has too few free pages
    """
    batch = batch_or_status if isinstance(batch_or_status, Batch) else None
    if isinstance(batch_or_status, tuple):
        raise ValueError(
            "raise_for_status takes a Batch or an array of Status, not a tuple: give it one result of "
            "allocate, fork, reorder or truncate"
        )
    try:
        status = np.asarray(batch.status if batch is not None else batch_or_status)
    except jax.errors.TracerArrayConversionError:
        raise ValueError(
            "raise_for_status runs on the host: return the status from jit, then call it"
        ) from None
    if not np.issubdtype(status.dtype, np.integer):
        raise ValueError(f"expected a Batch or an array of Status, not {status.dtype}{list(status.shape)}")
    status = np.atleast_1d(status)
    failed = np.argwhere((status != Status.OK) & (status != Status.PADDING))
    if not len(failed):
        return
    entry = tuple(failed[0].tolist())
    error, reason = _ERRORS[Status(int(status[entry]))]
    where = f"entry {entry[0] if len(entry) == 1 else entry}"
    if batch is not None:
        where += f" (slot {int(batch.seqs[entry])}, {int(batch.num_tokens[entry])} more tokens)"
        reason = _with_numbers(reason, batch, entry, error)
    more = len(failed) - 1
    others = f"; {more} more {'entry' if more == 1 else 'entries'} failed" if more else ""
    raise error(f"{where}: {reason}{others}")


def _with_numbers(reason: str, batch: Batch, entry: tuple[int, ...], error: type[JaxKVError]) -> str:
    """The reason, as far as the batch tells it apart and knows its numbers."""
    config, nth = batch.config, entry[-1]
    seqs, num_tokens = (np.asarray(whole)[entry[:-1]] for whole in (batch.seqs, batch.num_tokens))
    if error is OutOfPagesError:
        left = int(batch.num_free[entry[:-1]])
        return f"{reason}: {left} of {config.num_pages} are left, of {config.page_size} tokens each"
    if error is SequenceTooLongError:
        sizes = f"max_pages_per_seq={config.max_pages_per_seq} * page_size={config.page_size}"
        return f"{reason}, which holds {config.max_tokens_per_seq} tokens ({sizes})"
    if error is InvalidSequenceError:
        if seqs[nth] >= config.max_seqs:
            return f"slots are below max_seqs={config.max_seqs}"
        return f"entry {np.flatnonzero(seqs == seqs[nth])[0]} of the call names the same slot"
    if error is InvalidLengthError:
        total = batch.positions.shape[-1]
        if num_tokens[nth] < 0:
            return "num_tokens is negative"
        if config.layer_windows is not None and num_tokens[nth] > config.max_chunk:
            return f"a call takes at most max_chunk={config.max_chunk} tokens of each: prefill in chunks"
        end = int(np.sum(np.maximum(num_tokens[: nth + 1], 0)))
        return f"the entries up to this one have {end} tokens; give allocate(total_tokens=...), now {total}"
    return reason


def check_invariants(cache: KVCache) -> None:
    """Checks that the page table agrees with itself. Host side: it copies the table, not the pool.

    Raises:
      CacheCorruptedError: naming the page or slot, and why.

    Example:
      >>> import jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4)
      >>> jaxkv.check_invariants(jaxkv.init(config))
    """
    check_cache(cache)
    table, stats = jax.device_get((cache.table, cache.stats))
    _check_shapes(cache)
    owned = _check_rows(cache, table)
    _check_counts(cache, table, owned)
    _check_stack(cache, table)
    if table.prefixes is not None:
        check_index(cache.config, table, owned)
    _check_stats(cache, table, stats)


def _check_shapes(cache: KVCache) -> None:
    config, pool, table = cache.config, cache.pool, cache.table
    expected = {
        "pool.k": (pool.k, config.pool_shape, config.storage_dtype),
        "pool.v": (pool.v, config.pool_shape, config.storage_dtype),
        "table.pages": (table.pages, (config.num_rows, config.num_columns), "int32"),
        "table.lengths": (table.lengths, (config.num_rows,), "int32"),
        "table.positions": (table.positions, (config.max_seqs,), "int32"),
        "table.refcounts": (table.refcounts, (config.num_pages,), "int32"),
        "table.free_pages": (table.free_pages, (config.num_pages,), "int32"),
        "table.num_free": (table.num_free, (), "int32"),
        "table.fingerprint": (table.fingerprint, (2,), "uint32"),
        "stats.counters": (cache.stats.counters, (len(cache.stats.names()),), "int32"),
    }
    if config.prefix_cache != (table.prefixes is not None):
        has = "has no" if table.prefixes is None else "has an"
        raise CacheCorruptedError(
            f"the table {has} index of prefixes, but the config says prefix_cache={config.prefix_cache}"
        )
    if table.prefixes is not None:
        expected |= {
            f"table.prefixes.{name}": (getattr(table.prefixes, name), *of)
            for name, of in index_shapes(config).items()
        }
    if config.quantization is not None:
        scales = zip(("k_scale", "v_scale"), config.scale_shapes, strict=True)
        expected |= {
            f"pool.{name}": (getattr(pool, name), shape, config.scale_dtype) for name, shape in scales
        }
    elif pool.k_scale is not None or pool.v_scale is not None:
        raise CacheCorruptedError("the pool has scales, but the config says quantization=None")
    for name, (array, shape, dtype) in expected.items():
        if array is None:
            raise CacheCorruptedError(f"{name} is None; the config says {dtype}{list(shape)}")
        if array.shape != shape or array.dtype != dtype:
            raise CacheCorruptedError(
                f"{name} is {array.dtype}{list(array.shape)}; the config says {dtype}{list(shape)}"
            )


def _check_rows(cache: KVCache, table) -> np.ndarray:
    """Lengths, positions, and each row: valid distinct pages, then only `num_pages`. Returns who is owned."""
    config = cache.config
    sizes = np.repeat([group.page_size for group in config.groups], config.max_seqs)
    columns = np.repeat([group.columns for group in config.groups], config.max_seqs)
    position = np.tile(table.positions, len(config.groups))
    most = np.iinfo(np.int32).max
    _refuse(
        (table.positions < 0) | (table.positions > most),
        f"slot {{}}: position {{}} is not in 0..{most}",
        table.positions,
    )
    for number in np.flatnonzero((table.lengths < 0) | (table.lengths > sizes * columns))[:1]:
        most = sizes[number] * columns[number]
        raise CacheCorruptedError(
            f"{_row(config, number)}: length {table.lengths[number]} is not in 0..{most}"
        )
    # A row may be empty before its sequence's next token, where its window has released all others.
    full = np.repeat([group.window is None for group in config.groups], config.max_seqs)
    for number in np.flatnonzero((table.lengths > position) | full & (table.lengths == 0) & (position > 0))[
        :1
    ]:
        raise CacheCorruptedError(
            f"{_row(config, number)}: position {position[number]} does not fit its length"
        )
    used = -(-table.lengths // sizes)
    owned = np.arange(config.num_columns) < used[:, None]
    good = (table.pages >= 0) & (table.pages < config.num_pages)
    wrong = np.where(owned, ~good, table.pages != config.num_pages)
    for number, column in np.argwhere(wrong)[:1]:
        raise CacheCorruptedError(
            f"{_row(config, number)}: entry {column} of its row is {table.pages[number, column]}, "
            f"with {used[number]} pages in use of a pool of {config.num_pages}"
        )
    for number in np.flatnonzero(used > 1):
        ids, times = np.unique(table.pages[number, : used[number]], return_counts=True)
        if times.max() > 1:
            raise CacheCorruptedError(f"{_row(config, number)}: page {ids[times.argmax()]} is listed twice")
    return owned


def _row(config: CacheConfig, number: int | np.integer) -> str:
    group, slot = divmod(int(number), config.max_seqs)
    return f"slot {slot}" + (f", group {group}" if len(config.groups) > 1 else "")


def _check_counts(cache: KVCache, table, owned: np.ndarray) -> None:
    owners = np.bincount(table.pages[owned], minlength=cache.config.num_pages)
    recorded = np.zeros_like(owners) if table.prefixes is None else recorded_pages(table.prefixes)
    wrong = owners + recorded != table.refcounts
    for page in np.flatnonzero(wrong)[:1]:
        raise CacheCorruptedError(
            f"page {page}: refcount {table.refcounts[page]}, but {owners[page]} rows name it"
            + ", and the index of prefixes" * int(recorded[page])
        )


def _check_stack(cache: KVCache, table) -> None:
    num_pages, num_free = cache.config.num_pages, int(table.num_free)
    if not 0 <= num_free <= num_pages:
        raise CacheCorruptedError(f"num_free {num_free} is not in 0..{num_pages}")
    stack = table.free_pages[:num_free]
    outside = (stack < 0) | (stack >= num_pages)
    _refuse(outside, f"free stack entry {{}}: page {{}} is not in 0..{num_pages - 1}", stack)
    times = np.bincount(stack, minlength=num_pages)
    _refuse(times > 1, "page {} stands {} times on the free stack", times)
    _refuse((times > 0) & (table.refcounts > 0), "page {} is free and has refcount {}", table.refcounts)
    _refuse(
        (times == 0) & (table.refcounts == 0),
        "page {} is leaked: no row names it and it is not free (refcount {})",
        table.refcounts,
    )


def _check_stats(cache: KVCache, table, stats) -> None:
    in_use = cache.config.num_pages - int(table.num_free) - int(table.num_reclaimable)
    if stats.current_pages != in_use:
        raise CacheCorruptedError(f"stats.current_pages is {stats.current_pages}, but {in_use} are in use")
    if stats.peak_pages < in_use:
        raise CacheCorruptedError(f"stats.peak_pages {stats.peak_pages} is below the {in_use} in use")
    for name in stats.names():
        if getattr(stats, name) < 0:
            raise CacheCorruptedError(f"stats.{name} is {getattr(stats, name)}")
    taken, returned = int(stats.total_allocations), int(stats.total_deallocations)
    if max(taken, returned) < np.iinfo(np.int32).max and taken - returned != in_use:
        raise CacheCorruptedError(f"stats: {taken} pages taken less {returned} returned, but {in_use} in use")


def _refuse(wrong: np.ndarray, message: str, values: np.ndarray) -> None:
    for index in np.flatnonzero(wrong)[:1]:
        raise CacheCorruptedError(message.format(index, values[index]))
