"""Writes and reads K and V: append, gather."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxkv.entries import check_cache, check_call, clean_slots, rows_of
from jaxkv.groups import Group
from jaxkv.layers import Place, by_position, kinds_for, locate, of_shape, serve_batch, view, whole, widest
from jaxkv.operation import REPLICATED, as_given, axis_of, operation
from jaxkv.state import Batch, KVCache, KVPool
from pallas_kernels import append_kv
from pallas_kernels.checks import is_layer


def append(
    cache: KVCache,
    layer: int | Int[Array, ""],
    batch: Batch,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
) -> KVCache:
    """Writes one layer's K and V of this step's tokens to the token slots in `batch`.

        page_size 4, 3 tokens are appended to a sequence of 6:

        [a b c d][e f . .]      ->      [a b c d][e f 6 7][8 . . .]

    The write is in place if the caller's `jit` donates the cache and the next layer's K and V depend on this
    layer's `attend`, as in any model. Otherwise the compiler may run that append before this attend, and
    must copy the pool.

    Args:
      cache: the cache that `allocate` returned with `batch`.
      layer: Python int or traced int32. For a traced one out of range, or of a layer whose heads have
        another shape than `k`, nothing is written.
      batch: of this step. Once the page table has changed it is stale, and nothing is written.
      k, v: new keys (after RoPE) and values, converted to the pool's dtype or quantized. Rows of
        padding and of refused sequences are not written.

    Returns:
      The cache.

    Raises:
      ValueError: for wrong shapes or dtypes, at trace time.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=2, head_dim=8, num_pages=2)
      >>> cache, batch = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([1]))
      >>> cache = jaxkv.append(cache, 0, batch, jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8)))
    """
    check_cache(cache)
    k, v, config = jnp.asarray(k), jnp.asarray(v), cache.config
    kinds = kinds_for(config, layer)
    if len(kinds) > 1 and k.ndim == 3:
        kinds = of_shape(kinds, "k", head_dim=k.shape[2], kv_heads=k.shape[1])
    place, kind = serve_batch(cache, locate(config, layer, kinds), batch)
    return _append(cache, place, batch, k, v, kind=kind)


@operation(results=lambda cache, *_: as_given(cache), static=("kind",))
@jax.named_scope("jaxkv.append")
def _append(cache: KVCache, place: Place, batch: Batch, k: Array, v: Array, *, kind: Group) -> KVCache:
    pool = view(cache.pool, cache.config, kind)
    written = append_kv(
        pool.k,
        pool.v,
        k,
        v,
        batch.page_ids[place.group],
        batch.offsets[place.group],
        layer=place.index,
        k_scales=pool.k_scale,
        v_scales=pool.v_scale,
        kv_format=cache.config.storage.name,
    )
    return replace(cache, pool=whole(KVPool(*written), cache.config))


def gather(
    cache: KVCache, layer: int | Int[Array, ""], seqs: Int[Array, " seqs"]
) -> tuple[
    Float[Array, "seqs max_tokens kv_heads head_dim"],
    Float[Array, "seqs max_tokens kv_heads head_dim"],
    Int[Array, " seqs"],
]:
    """A dense, dequantized copy of some sequences, for inspection and for attention on dense K and V.

    Args:
      cache: the cache.
      layer: Python int or traced int32; results are NaN for a traced layer out of range.
      seqs: slots. Padding, empty slots and slots beyond `max_seqs` give zeros and length 0.

    Returns:
      `(k, v, lengths)`; K and V are zero past each length. `max_tokens` is `config.max_tokens_per_seq`. In a
      layer with a window of its own tokens are at their positions, and zeros where they were released; its
      length is then the sequence's tokens so far. Positions from `max_tokens` on, which a sequence reaches
      only with a policy, are left out.

    Raises:
      ValueError: for a traced layer where layers differ in shape.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=2, head_dim=8, num_pages=2)
      >>> k, v, lengths = jaxkv.gather(jaxkv.init(config), 0, jnp.array([0]))
      >>> k.shape
      (1, 32, 2, 8)
    """
    (seqs,) = check_call(cache, seqs=seqs)
    kinds = kinds_for(cache.config, layer)
    if len({(kind.num_kv_heads, kind.head_dim) for kind in kinds}) > 1:
        raise ValueError("gather takes a traced layer only where all layers have heads of one shape")
    place, kind = locate(cache.config, layer, kinds)
    return _gather(cache, place, seqs, kind=widest(kinds) if len(kinds) > 1 else kind)


def _gathered_specs(cache: KVCache, *_):
    dense = PartitionSpec(None, None, axis_of(cache.pool.k, 2), None)
    return dense, dense, REPLICATED


@operation(results=_gathered_specs, static=("kind",))
def _gather(cache: KVCache, place: Place, seqs: Array, *, kind: Group) -> tuple[Array, Array, Array]:
    config, max_tokens = cache.config, cache.config.max_tokens_per_seq
    slot = clean_slots(seqs, config.max_seqs, once=False)
    row = jnp.where(slot < config.max_seqs, place.group * config.max_seqs + slot, config.num_rows)
    stored = rows_of(cache.table.lengths, row)
    pages = rows_of(cache.table.pages, row, config.num_pages)[:, : kind.columns]
    windowed = [group.window is not None for group in config.groups]
    start = rows_of(cache.table.positions, slot) - stored
    start = jnp.where(jnp.asarray(windowed)[place.group], start, 0)
    exists, index = (
        is_layer(place.index, config.pool_shape[0]),
        jnp.clip(place.index, 0, config.pool_shape[0] - 1),
    )

    def dense(tiles):
        tokens = jnp.swapaxes(tiles, 2, 3).reshape(seqs.shape[0], -1, kind.num_kv_heads, kind.head_dim)
        if any(windowed):
            tokens = by_position(tokens, start, stored, max_tokens)
        else:
            real = jnp.arange(max_tokens, dtype=jnp.int32)[None] < stored[:, None]
            tokens = jnp.where(real[..., None, None], tokens[:, :max_tokens], 0)
        return jnp.where(exists, tokens, jnp.nan)

    pool = jax.tree.leaves(view(cache.pool, config, kind))
    tiles = [leaf.at[index, pages].get(mode="fill", fill_value=0)[:, :, :, : kind.page_size] for leaf in pool]
    k, v = config.storage.decode_pair(tiles, config.dtype)
    return dense(k), dense(v), start + stored


def keys(
    cache: KVCache, layer: int | Int[Array, ""]
) -> Float[Array, "max_seqs max_tokens kv_heads head_dim"]:
    """One layer's keys of a contiguous cache, by slot, zero past each length.

    Raises:
      ValueError: if the config is not `CacheConfig.contiguous(...)`; `gather` works for any.
    """
    return _contiguous_view(cache, layer)[0]


def values(
    cache: KVCache, layer: int | Int[Array, ""]
) -> Float[Array, "max_seqs max_tokens kv_heads head_dim"]:
    """One layer's values of a contiguous cache, by slot, zero past each length.

    Raises:
      ValueError: if the config is not `CacheConfig.contiguous(...)`; `gather` works for any.
    """
    return _contiguous_view(cache, layer)[1]


def _contiguous_view(cache: KVCache, layer):
    config = cache.config
    if not config.is_contiguous:
        raise ValueError(
            f"keys and values need a contiguous config (one page per sequence), not "
            f"num_pages={config.num_pages}, max_pages_per_seq={config.max_pages_per_seq}, "
            f"max_seqs={config.max_seqs}; use gather"
        )
    return gather(cache, layer, jnp.arange(config.max_seqs, dtype=jnp.int32))
