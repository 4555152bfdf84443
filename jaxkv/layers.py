"""Where a layer's K and V are: the rows of its group, and its view of the pool."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int, Shaped

from jaxkv.config import CacheConfig
from jaxkv.fingerprint import is_current
from jaxkv.groups import Group
from jaxkv.state import Batch, KVCache, KVPool
from pallas_kernels import copy_pages, move_pages
from pallas_kernels.checks import as_layer, check_layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Place:
    """Where the K and V of a layer are.

    Attributes:
      group: number of its group, a Python int where there is only one.
      index: its number among the group's layers; past the last where nothing may be read or written.
    """

    group: Int[Array, ""] | int
    index: Int[Array, ""]


class Located(NamedTuple):
    """A layer, and what is static of its kind."""

    place: Place
    kind: Group


def locate(config: CacheConfig, layer: int | Array, kinds: list[Group]) -> Located:
    """A layer of the config, among kinds that share a shape and, where it matters, a window.

    Args:
      config: of the cache.
      layer: checked by `check_layer`.
      kinds: a group of each kind that a traced layer may be of; of another it is no layer.
    """
    groups, past = config.groups, config.pool_shape[0]
    if isinstance(layer, Tracer) or len(groups) == 1:
        number = as_layer(layer)
        if len(groups) == 1:
            return Located(Place(0, number), groups[0])
        shapes = {kind.shape for kind in kinds}
        known = (number >= 0) & (number < config.num_layers)
        at = jnp.clip(number, 0, config.num_layers - 1)
        of_group = jnp.asarray([home.group for home in config.homes], jnp.int32)
        index = [home.nth if groups[home.group].shape in shapes else past for home in config.homes]
        index = jnp.where(known, jnp.asarray(index, jnp.int32)[at], jnp.int32(past))
        return Located(Place(of_group[at], index), kinds[0])
    home = config.homes[int(layer)]
    place = Place(jnp.asarray(home.group, jnp.int32), jnp.asarray(home.nth, jnp.int32))
    return Located(place, groups[home.group])


def kinds_for(config: CacheConfig, layer: int | Array) -> list[Group]:
    """A group of each kind that the layer may be of: its own, or of a traced layer all kinds."""
    check_layer(layer, config.num_layers)
    groups = config.groups
    if not isinstance(layer, Tracer):
        return [groups[config.homes[int(layer)].group]]
    return list({group.shape: group for group in reversed(groups)}.values())[::-1]


def of_shape(
    kinds: list[Group], what: str, *, head_dim: int | None, kv_heads: int | None = None
) -> list[Group]:
    """Those with heads of this shape, where there are several; a `ValueError` where there are none.

    Args:
      kinds: from `kinds_for`.
      what: the array that has such heads, for the message.
      head_dim, kv_heads: None where it is not known.
    """
    if len(kinds) == 1:
        return kinds
    fitting = [
        kind for kind in kinds if head_dim in (None, kind.head_dim) and kv_heads in (None, kind.num_kv_heads)
    ]
    if not fitting:
        shapes = ", ".join(sorted({f"[{kind.num_kv_heads}, {kind.head_dim}]" for kind in kinds}))
        raise ValueError(f"{what} fits no layer of the cache: KV heads and head_dim are one of {shapes}")
    return fitting


def widest(kinds: list[Group]) -> Group:
    """The kind with the longest rows."""
    return max(kinds, key=lambda kind: kind.columns)


def check_batch(batch: object) -> None:
    """Refuses what is not a batch."""
    if not isinstance(batch, Batch):
        raise ValueError(
            f"batch must be the jaxkv.Batch that allocate returned, not a {type(batch).__name__}"
        )


def serve_batch(cache: KVCache, located: Located, batch: Batch) -> Located:
    """The layer; none for a batch that the cache cannot serve, which no kernel reads or writes.

    Raises:
      ValueError: for a batch of another config.
    """
    check_batch(batch)
    if batch.config != cache.config:
        differing = ", ".join(
            f"{field.name}={getattr(batch.config, field.name)!r} (not {getattr(cache.config, field.name)!r})"
            for field in fields(CacheConfig)
            if getattr(batch.config, field.name) != getattr(cache.config, field.name)
        )
        raise ValueError(f"the batch is of another cache, with {differing}")
    place, past = located.place, jnp.int32(cache.config.pool_shape[0])
    index = jnp.where(is_current(cache.table, batch), place.index, past)
    return Located(Place(place.group, index), located.kind)


def view(pool: KVPool, config: CacheConfig, kind: Group) -> KVPool:
    """The pool as layers of this kind see it: other names of the same memory.

    Scales may have more slots a page than `page_size`; those past it are not used.
    """
    if config.uniform:
        return pool
    row = config.storage.row_size(kind.head_dim)
    shape = (*pool.k.shape[:2], kind.num_kv_heads, kind.page_size, row)
    scales = [
        scale.reshape(*shape[:3], -1, *own[4:])
        for scale, own in zip((pool.k_scale, pool.v_scale), config.storage.scale_shapes(shape), strict=False)
        if scale is not None
    ]
    return KVPool(pool.k.reshape(shape), pool.v.reshape(shape), *scales)


def whole(pool: KVPool, config: CacheConfig) -> KVPool:
    """The reverse of `view`."""
    if config.uniform:
        return pool
    shapes = config.pool_shape, config.pool_shape, *config.scale_shapes
    leaves = (pool.k, pool.v, pool.k_scale, pool.v_scale)
    return KVPool(
        *(leaf.reshape(shape) for leaf, shape in zip(leaves, shapes, strict=False) if leaf is not None)
    )


def copy_within(pool: KVPool, sources: Array, destinations: Array, config: CacheConfig) -> KVPool:
    """Copies whole pages; see `pallas_kernels.copy_pages`."""
    seen = view(pool, config, config.groups[0])
    pages = copy_pages(seen.k, seen.v, sources, destinations, **_beside_pages(seen, config))
    return whole(KVPool(*pages), config)


def move_within(pool: KVPool, targets: Array, config: CacheConfig) -> KVPool:
    """Moves whole pages, as if all at once; see `pallas_kernels.move_pages`."""
    seen = view(pool, config, config.groups[0])
    pages = move_pages(seen.k, seen.v, targets, **_beside_pages(seen, config))
    return whole(KVPool(*pages), config)


def _beside_pages(pool: KVPool, config: CacheConfig) -> dict[str, Any]:
    return dict(k_scales=pool.k_scale, v_scales=pool.v_scale, kv_format=config.storage.name)


def by_position(
    rows: Shaped[Array, "entries ..."],
    start: Int[Array, " entries"],
    stored: Int[Array, " entries"],
    max_tokens: int,
    *,
    axis: int = 1,
) -> Shaped[Array, "entries ..."]:
    """What rows hold for their token slots, at the tokens' positions; zeros elsewhere.

    Args:
      rows: an axis of them for token slots.
      start: position of each row's first token slot.
      stored: token slots in use.
      max_tokens: positions, static.
      axis: of the token slots.
    """
    slot = jnp.arange(max_tokens, dtype=jnp.int32)[None] - start[:, None]
    kept = (slot >= 0) & (slot < stored[:, None])
    shape = [rows.shape[0], *(1,) * (rows.ndim - 1)]
    shape[axis] = max_tokens
    index = jnp.clip(slot, 0, rows.shape[axis] - 1).reshape(shape)
    return jnp.where(kept.reshape(shape), jnp.take_along_axis(rows, index, axis=axis), 0)
