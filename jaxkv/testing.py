"""Assertions for tests of code that uses the cache. Import it explicitly: `import jaxkv.testing`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxkv.entries import check_cache
from jaxkv.errors import CacheCorruptedError
from jaxkv.hlo import copies_of
from jaxkv.invariants import check_invariants
from jaxkv.pages import lengths
from jaxkv.pool import gather
from jaxkv.state import KVCache, KVPool

_gather = jax.jit(gather, static_argnums=1)
# Codes whose value is NaN or infinite, or that have a scale of NaN beside them.
_WORST_CODE = {"uint16": 0xFFFF, "int8": -128, "uint8": 0, "int32": -1}


def poison_free_pages(cache: KVCache) -> KVCache:
    """NaN in every page that nobody owns, so that a read of one shows in the output; may be called in `jit`.

    Args:
      cache: the cache. After `free`, `truncate` or an eviction its pages are poisoned again by another call.

    Returns:
      The cache. Quantized pages decode to NaN, those of int4 to infinity.

    Example:
      >>> import jax.numpy as jnp, jaxkv, jaxkv.testing
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4, dtype="float32")
      >>> cache = jaxkv.testing.poison_free_pages(jaxkv.init(config))
      >>> bool(jnp.all(jnp.isnan(cache.pool.k)))
      True
    """
    check_cache(cache)
    return poison_pages(cache, cache.table.refcounts == 0)


def poison_pages(cache: KVCache, pages: Bool[Array, " pages"]) -> KVCache:
    """As `poison_free_pages`, of the pages that are marked."""

    def spoil(pool: Array) -> Array:
        mark = pages.reshape(1, -1, *[1] * (pool.ndim - 2))
        worst = jnp.nan if jnp.issubdtype(pool.dtype, jnp.floating) else _WORST_CODE[str(pool.dtype)]
        return jnp.where(mark, jnp.asarray(worst, pool.dtype), pool)

    return replace(cache, pool=jax.tree.map(spoil, cache.pool))


def assert_caches_equivalent(a: KVCache, b: KVCache) -> None:
    """Asserts that two caches hold the same sequences with the same contents.

    Slots, lengths, positions, and K and V of every token in every layer are compared, these exactly; in a
    layer with a window, of the tokens that the next one attends to. Page ids, page sizes, sharing, the free
    stack and the counters may differ.

    Args:
      a: a cache.
      b: another.

    Raises:
      AssertionError: naming the first slot, layer and token that differ.

    Example:
      >>> import jax.numpy as jnp, jaxkv, jaxkv.testing
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4)
      >>> cache, _ = jaxkv.allocate(jaxkv.init(config), jnp.array([0, 1]), jnp.array([1, 1]))
      >>> cache = jaxkv.free(cache, jnp.array([0]))
      >>> jaxkv.testing.assert_caches_equivalent(cache, jaxkv.compact(cache)[0])
    """
    for name in (
        "num_layers",
        "layer_windows",
        "num_kv_heads",
        "layer_kv_heads",
        "head_dim",
        "layer_head_dims",
    ):
        _assert_same(getattr(a.config, name), getattr(b.config, name), name)
    _assert_same(a.config.max_seqs, b.config.max_seqs, "max_seqs")
    for name, of in (("lengths", lengths), ("positions", lambda cache: cache.table.positions)):
        pairs = zip(*(np.asarray(of(x)).tolist() for x in (a, b)), strict=True)
        for slot, (one, other) in enumerate(pairs):
            _assert_same(one, other, f"{name}[{slot}]")
    for slot in np.flatnonzero(np.asarray(a.table.positions)).tolist():
        for layer in range(a.config.num_layers):
            contents = _common_contents(a, b, layer, slot)
            for name, one, other in zip("kv", *contents, strict=True):
                differs = np.any((one != other) & ~(np.isnan(one) & np.isnan(other)), axis=(1, 2))
                if differs.any():
                    token = np.flatnonzero(differs)[0]
                    raise AssertionError(f"{name} of slot {slot} differs in layer {layer} at token {token}")


def assert_invariants(cache: KVCache) -> None:
    """`jaxkv.check_invariants` as an assertion.

    Args:
      cache: a cache.

    Raises:
      AssertionError: naming the page or slot that is wrong, and why.
    """
    try:
        check_invariants(cache)
    except CacheCorruptedError as error:
        raise AssertionError(str(error)) from error


def assert_in_place(
    fn: Callable,
    *args: object,
    donate_argnums: int | Sequence[int] = 0,
    max_temp_bytes: int | None = None,
) -> None:
    """Asserts that `jax.jit(fn, donate_argnums=...)` updates the cache in place, without copying the pool.

    Compiles but does not run `fn`, so `args` may be `jax.ShapeDtypeStruct`s (from `jax.eval_shape`), of
    pools larger than this machine's memory. Use a pool much larger than the activations, or set
    `max_temp_bytes`.

    A write to the pool must come after the reads of what it replaces. In a model it does, since a
    layer's K and V depend on the attention of the layer before. If an `append` does not depend on an
    earlier `attend`, the compiler may copy the pool.

    Args:
      fn: takes and returns at least one `KVCache`, somewhere in its arguments and results.
      *args: its arguments, arrays or shapes.
      donate_argnums: the arguments to donate, as for `jax.jit`.
      max_temp_bytes: most memory of the compiled program beside its arguments and results.
        Default: less than one layer of one pool array.

    Raises:
      AssertionError: for an output that does not reuse a donated pool, an instruction that copies a
        pool, or too much temporary memory.
      ValueError: if no `KVCache` is among the arguments, or the compiler does not report memory use.

    Example:
      >>> import jax, jax.numpy as jnp, jaxkv, jaxkv.testing
      >>> config = jaxkv.CacheConfig(num_layers=2, num_kv_heads=2, head_dim=64, num_pages=64)
      >>> cache = jax.eval_shape(lambda: jaxkv.init(config))
      >>> jaxkv.testing.assert_in_place(jaxkv.free, cache, jnp.array([0, 1]))
    """
    leaves = jax.tree.leaves(args, is_leaf=lambda x: isinstance(x, KVPool))
    caches = [leaf for leaf in leaves if isinstance(leaf, KVPool)]
    pools = [array for pool in caches for array in jax.tree.leaves(pool)]
    if not pools:
        raise ValueError("assert_in_place needs a KVCache among the arguments")
    compiled = jax.jit(fn, donate_argnums=donate_argnums).lower(*args).compile()
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    if memory is None or hlo is None:
        raise ValueError(f"the compiler of {jax.default_backend()} does not report its memory use")
    sizes = [_bytes(pool) for pool in pools]
    if memory.alias_size_in_bytes < sum(sizes):
        raise AssertionError(
            f"only {memory.alias_size_in_bytes} bytes of the results reuse donated memory; "
            f"the pool has {sum(sizes)}: is the cache donated and returned?"
        )
    for copy in copies_of(hlo, {pool.shape for pool in pools}):
        raise AssertionError(f"the compiled program copies a whole pool: {copy}")
    allowed = max_temp_bytes
    if allowed is None:
        # The scales of codes are small.
        allowed = min(_bytes(pool.k) // pool.k.shape[0] for pool in caches) - 1
    if memory.temp_size_in_bytes > allowed:
        raise AssertionError(
            f"the compiled program takes {memory.temp_size_in_bytes} bytes of temporary memory, "
            f"more than {allowed}; the pool has {sum(sizes)}: does a larger one, given as shapes by "
            "jax.eval_shape, change that? Else something as large as a layer of the pool is copied"
        )


def _common_contents(a: KVCache, b: KVCache, layer: int, slot: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """K and V of one slot in both; where the layer has a window, what the next token attends to."""
    config = a.config
    window = config.groups[config.homes[layer].group].window
    contents = []
    for cache in (a, b):
        k, v, length = _gather(cache, layer, jnp.array([slot], jnp.int32))
        first = 0 if window is None else max(0, int(length[0]) - window + 1)
        contents.append((np.asarray(k[0, first : int(length[0])]), np.asarray(v[0, first : int(length[0])])))
    return contents


def _assert_same(one: object, other: object, name: str) -> None:
    if one != other:
        raise AssertionError(f"{name} differs: {one} and {other}")


def _bytes(array: jax.Array | jax.ShapeDtypeStruct) -> int:
    return array.size * jnp.dtype(array.dtype).itemsize
