"""Writes and reads K and V: append, gather."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxkv.config import CacheConfig
from jaxkv.entries import check_vectors, clean_slots, rows_of
from jaxkv.fingerprint import layer_for
from jaxkv.operation import REPLICATED, as_given, axis_of, operation
from jaxkv.state import Batch, KVCache, KVPool
from pallas_kernels import append_kv
from pallas_kernels.checks import as_layer, check_layer, is_layer
from pallas_kernels.copy_pages import copy_pages


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
      layer: Python int or traced int32. For a traced layer out of range nothing is written.
      batch: this step's. Once the page table has changed it is stale, and nothing is written.
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
    return _append(cache, layer_for(cache, layer, batch), batch, jnp.asarray(k), jnp.asarray(v))


@operation(results=lambda cache, *_: as_given(cache))
@jax.named_scope("jaxkv.append")
def _append(cache: KVCache, layer: Array, batch: Batch, k: Array, v: Array) -> KVCache:
    pool = cache.pool
    written = append_kv(
        pool.k,
        pool.v,
        k,
        v,
        batch.page_ids,
        batch.offsets,
        layer=layer,
        k_scales=pool.k_scale,
        v_scales=pool.v_scale,
        kv_format=cache.config.storage.name,
    )
    return replace(cache, pool=KVPool(*written))


def copy_within(pool: KVPool, sources: Array, destinations: Array, config: CacheConfig) -> KVPool:
    """Copies whole pages, in all layers; see `pallas_kernels.copy_pages`."""
    pages = copy_pages(
        pool.k,
        pool.v,
        sources,
        destinations,
        k_scales=pool.k_scale,
        v_scales=pool.v_scale,
        kv_format=config.storage.name,
    )
    return KVPool(*pages)


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
      `(k, v, lengths)`; K and V are zero past each length. `max_tokens` is
      `config.max_tokens_per_seq`.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=2, head_dim=8, num_pages=2)
      >>> k, v, lengths = jaxkv.gather(jaxkv.init(config), 0, jnp.array([0]))
      >>> k.shape
      (1, 32, 2, 8)
    """
    (seqs,) = check_vectors(seqs=seqs)
    config = cache.config
    check_layer(layer, config.num_layers)
    return _gather(cache, as_layer(layer), seqs)


def _gathered_specs(cache: KVCache, *_):
    dense = PartitionSpec(None, None, axis_of(cache.pool.k, 2), None)
    return dense, dense, REPLICATED


@operation(results=_gathered_specs)
def _gather(cache: KVCache, layer: Array, seqs: Array) -> tuple[Array, Array, Array]:
    config = cache.config
    slot = clean_slots(seqs, config.max_seqs, once=False)
    lengths = rows_of(cache.table.lengths, slot)
    pages = rows_of(cache.table.pages, slot, config.num_pages)
    real = jnp.arange(config.max_tokens_per_seq, dtype=jnp.int32)[None] < lengths[:, None]

    def dense(tiles):
        tokens = jnp.swapaxes(tiles, 2, 3).reshape(*real.shape, config.num_kv_heads, config.head_dim)
        return jnp.where(exists, jnp.where(real[..., None, None], tokens, 0), jnp.nan)

    exists = is_layer(layer, config.num_layers)
    layer = jnp.clip(layer, 0, config.num_layers - 1)
    rows = [leaf.at[layer, pages].get(mode="fill", fill_value=0) for leaf in jax.tree.leaves(cache.pool)]
    k, v = config.storage.decode_pair(rows, config.dtype)
    return dense(k), dense(v), lengths


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
