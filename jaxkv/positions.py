"""Moving kept keys to other positions, so that a sequence can go on beyond its model's context."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.arguments import whole
from jaxkv.config import CacheConfig
from jaxkv.entries import check_call, clean_slots, first_fault, lengths_of, pages_for, rows_of
from jaxkv.fingerprint import Operation, stamp
from jaxkv.layers import copy_within
from jaxkv.operation import REPLICATED, as_given, operation
from jaxkv.rewrite import Layer, numbers, own_pages, stored_as
from jaxkv.rope import Rope
from jaxkv.state import KVCache, KVPool, Status
from pallas_kernels import control_flow
from pallas_kernels.ragged import ragged_rows

# Of one layer's keys that are rotated at a time.
_VISIT_BYTES = 8 * 2**20
_MOST = 2**31 - 1


def shift_positions(
    cache: KVCache,
    seqs: Int[Array, " seqs"],
    by: Int[Array, " seqs"],
    *,
    rope: Rope,
    first: int = 0,
) -> tuple[KVCache, Int[Array, " seqs"]]:
    """Rotates the keys that a sequence kept to positions `by` further on, and its next token's with them.

        positions       0 1 2 3 | 90 91 92 93        next 94
        by -86, first 4 0 1 2 3 |  4  5  6  7        next  8

    Only differences of positions count in rotary attention: what moves together sees itself as before. A
    page that others share is copied first; they read what they read before. Values of few bits are rounded
    once more each time, so shift seldom and far.

    Args:
      cache: the cache.
      seqs: slots; a negative one is padding. A slot may be named once a call.
      by: positions, negative as a rule; one element an entry.
      rope: how the model rotates its keys.
      first: token slots before it stay where they are; static.

    Returns:
      The cache and a `Status` for each entry: INVALID_SEQ for an empty slot, one beyond `max_seqs` or named
      before; INVALID_LENGTH where the next position would fall below the token slots in use, or beyond
        int32;
      OUT_OF_PAGES where there is no page for a copy. Such a sequence is as it was.

    Raises:
      ValueError: for wrong shapes or dtypes, or a rope of another head_dim, at trace time; for a cache with
        layers of several kinds, or with windows.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([1]))
      >>> rope = jaxkv.Rope.of(head_dim=8, theta=10000.0)
      >>> cache, status = jaxkv.shift_positions(cache, jnp.array([0]), jnp.array([5]), rope=rope)
      >>> int(status[0]), int(cache.table.positions[0])
      (0, 6)
    """
    seqs, by = check_call(cache, seqs=seqs, by=by)
    config = cache.config
    check_one_kind(config, "shift_positions")
    check_rope(rope, config.head_dim)
    asked, first = first, -1 if whole(first) is None else int(first)
    if first < 0:
        raise ValueError(f"first={asked!r} must be an integer, 0 or more, and known at trace time")
    return _shift_positions(cache, seqs, by, rope=rope, first=first)


@operation(results=lambda cache, *_: (as_given(cache), REPLICATED), static=("rope", "first"))
def _shift_positions(
    cache: KVCache, seqs: Array, by: Array, *, rope: Rope, first: int
) -> tuple[KVCache, Array]:
    config = cache.config
    slot = clean_slots(seqs, config.max_seqs)
    length, position = lengths_of(cache.table, slot, config), rows_of(cache.table.positions, slot)
    status = first_fault(
        (seqs < 0, Status.PADDING),
        (length == 0, Status.INVALID_SEQ),
        ((by < length - position) | (by > _MOST - position), Status.INVALID_LENGTH),
    )
    moves = (status == Status.OK) & (by != 0)
    column = jnp.full_like(slot, first // config.page_size)
    column = jnp.minimum(column, pages_for(length, config.page_size))
    cache, plan = own_pages(cache, jnp.where(moves, slot, config.max_seqs), column, length)
    copied = (plan.slot < config.max_seqs)[None, :, None] & (plan.old != plan.new)
    destinations = jnp.where(copied, plan.new, config.num_pages).reshape(-1)
    pool = copy_within(cache.pool, plan.old.reshape(-1), destinations, config)
    owned = jnp.where(plan.slot < config.max_seqs, pages_for(length, config.page_size) - column, 0)
    pool = _rotate_keys(pool, config, plan.new, column, owned, by, rope, first)
    table = replace(cache.table, positions=cache.table.positions.at[plan.slot].add(by, mode="drop"))
    shifted = plan.slot < config.max_seqs
    table = stamp(table, Operation.SHIFT_POSITIONS, shifted, plan.slot, by, jnp.full_like(by, first))
    return replace(cache, pool=pool, table=table), jnp.where(moves, plan.status, status)


def check_one_kind(config: CacheConfig, what: str) -> None:
    """Layers all of one kind: others have other rotary settings."""
    kinds = {group.shape for group in config.groups}
    if len(kinds) > 1 or config.layer_windows is not None:
        windows = ", ".join(str(kind.window) for kind in kinds)
        raise ValueError(
            f"{what} needs layers of one kind, with full attention; the cache has windows {windows}"
        )


def check_rope(rope: object, head_dim: int) -> None:
    """A `Rope` that fits heads of this size."""
    if not isinstance(rope, Rope):
        raise ValueError(f"rope={rope!r} must be a jaxkv.Rope")
    if 2 * len(rope.frequencies) > head_dim:
        raise ValueError(
            f"rope rotates {2 * len(rope.frequencies)} features; the cache has head_dim={head_dim}"
        )


def _rotate_keys(pool: KVPool, config, rows, column, owned, by, rope: Rope, first: int) -> KVPool:
    """A walk over the pages of all sequences, some at a time, in each layer."""
    page_bytes = config.num_kv_heads * config.page_size * config.head_dim * 4
    most = rows.shape[1] * rows.shape[2]
    size = max(1, min(most, _VISIT_BYTES // page_bytes))
    ends = jnp.cumsum(owned, dtype=jnp.int32)
    offset = jnp.arange(config.page_size, dtype=jnp.int32)

    def visit(trip, keys):
        layer = Layer.of(trip % config.num_layers, config)
        entry, nth = ragged_rows(ends, size, trip // config.num_layers * size)
        nth = nth + rows_of(column, entry)
        page, layer = rows_of(rows[layer.group], (entry, nth), config.num_pages), layer.nth
        old = [None if part is None else part.at[layer, page].get(mode="fill", fill_value=0) for part in keys]
        rotated = rope.shift(numbers(config, *old), rows_of(by, entry)[:, None, None])
        new = stored_as(config, rotated, keys=True)
        moves = (nth[:, None] * config.page_size + offset[None] >= first)[:, None, :]
        return tuple(
            None if part is None else _write_pages(part, layer, page, moves, was, now)
            for part, was, now in zip(keys, old, new, strict=True)
        )

    trips = (ends[-1] + size - 1) // size * config.num_layers
    k, k_scale = control_flow.fori_loop(0, trips, visit, (pool.k, pool.k_scale))
    return replace(pool, k=k, k_scale=k_scale)


def _write_pages(pages, layer, page, moves, was, now):
    moves = moves.reshape(*moves.shape, *(1,) * (now.ndim - moves.ndim))
    return pages.at[layer, page].set(jnp.where(moves, now, was), mode="drop")
