"""Attention of this step's tokens over their sequences."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels
from jaxkv.entries import check_cache, clean_slots, rows_of
from jaxkv.groups import Group
from jaxkv.layers import (
    Located,
    Place,
    by_position,
    check_batch,
    kinds_for,
    locate,
    of_shape,
    serve_batch,
    view,
)
from jaxkv.operation import axis_of, operation
from jaxkv.state import Batch, KVCache, KVPool
from pallas_kernels import paged_attention
from pallas_kernels.checks import Options, check_options, is_layer


@overload
def attend(
    cache: KVCache,
    layer: int | Int[Array, ""],
    batch: Batch,
    q: Float[Array, "tokens q_heads head_dim"],
    *,
    scale: float | None = ...,
    window: int | Literal["layer"] | None = ...,
    sink_tokens: int = ...,
    softcap: float | None = ...,
    sink_logits: Float[Array, " q_heads"] | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Array: ...


@overload
def attend(
    cache: KVCache,
    layer: int | Int[Array, ""],
    batch: Batch,
    q: Float[Array, "tokens q_heads head_dim"],
    *,
    scale: float | None = ...,
    window: int | Literal["layer"] | None = ...,
    sink_tokens: int = ...,
    softcap: float | None = ...,
    sink_logits: Float[Array, " q_heads"] | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...


def attend(
    cache: KVCache,
    layer: int | Int[Array, ""],
    batch: Batch,
    q: Float[Array, "tokens q_heads head_dim"],
    *,
    scale: float | None = None,
    window: int | Literal["layer"] | None = "layer",
    sink_tokens: int = 0,
    softcap: float | None = None,
    sink_logits: Float[Array, " q_heads"] | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Causal attention of each token over its own sequence, up to and including itself.

    Adjacent sequences of the batch that begin with the same pages, as forks do, read those pages once where
    that saves memory traffic: `n` sequences that share `s` tokens save reading the K and V of `(n - 1) * s`
    tokens, but add partial results to merge. Shared pages are looked for with up to 16 tokens per sequence,
    without a `window`, where the full rows of all sequences but one take at least 16 MiB of a layer.

    For inference only: the loop over the pages has no reverse-mode derivative.

    Args:
      cache: the cache after this layer's `append`.
      layer: Python int or traced int32. For a traced one out of range every result is NaN. Where layers
        differ in window or shape, pass `window` with a traced one, to say which kind it is of; for a layer of
        another kind every result is NaN.
      batch: of this step. Once the page table has changed it is stale, and every result is NaN.
      q: queries, after RoPE; `q_heads` a multiple of the cache's KV heads.
      scale: of the scores. Default: `1 / sqrt(head_dim)`.
      window: a token attends to itself and the `window - 1` token slots before it; None for all of them.
        Default: the layer's own, as the config has it; a narrower one is allowed, a wider one is an error. In
        layers with full attention the window of the cache's policy and its sink tokens apply if it is
        smaller.
      sink_tokens: first token slots of a sequence, attended to whatever the window
        (StreamingLLM, arXiv:2309.17453). It must be 0 without a window, and in layers whose window releases
        the first pages.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      sink_logits: one logit per query head, added to the softmax's denominator (gpt-oss).
      backend: "auto", "xla", or "triton" on a GPU.
      return_lse: also return the log-sum-exp of the scores, for merging partial results and for
        `attention_mass`.

    Returns:
      `out [tokens, q_heads, head_dim]` in `q`'s dtype; zeros for padding and refused sequences.
      With `return_lse` also float32 `[tokens, q_heads]`; `-inf` for padding and refused sequences.

    Raises:
      ValueError: for wrong shapes, dtypes or options, at trace time; for a window wider than the layer's.
      NotImplementedError: for a backend that cannot serve the call.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2)
      >>> cache, batch = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([1]))
      >>> cache = jaxkv.append(cache, 0, batch, jnp.ones((1, 1, 8)), jnp.full((1, 1, 8), 3.0))
      >>> float(jaxkv.attend(cache, 0, batch, jnp.ones((1, 2, 8)))[0, 1, 0])
      3.0
    """
    q = _queries(cache, q, batch)
    (place, kind), options = _located(cache, layer, batch, q, scale, window, sink_tokens, softcap)
    sink_logits = None if sink_logits is None else jnp.asarray(sink_logits)
    out, lse = _attend(cache, place, batch, q, sink_logits, kind=kind, backend=backend, options=options)
    return (out, lse) if return_lse else out


def attention_mass(
    cache: KVCache,
    layer: int | Int[Array, ""],
    batch: Batch,
    q: Float[Array, "tokens q_heads head_dim"],
    lse: Float[Array, "tokens q_heads"],
    *,
    scale: float | None = None,
    window: int | Literal["layer"] | None = "layer",
    sink_tokens: int = 0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Float[Array, "entries kv_heads max_tokens"]:
    """How much attention each token slot received from this step's queries; reads K once more.

    The next write to the pool must wait for this read, or the compiler copies the pool. A `lax.scan` over
    layers ensures that. In a Python loop write `out = jaxkv.after(out, mass)`.

    Args:
      cache, layer, batch, q: as given to `attend`; the cache before the next layer's `append`.
      lse: what `attend` returned with `return_lse=True`. With `sink_logits` it includes their share of the
        softmax, which no token slot receives.
      scale, window, sink_tokens, softcap: as given to `attend`.
      backend: "auto", "xla", or "triton" on a GPU.

    Returns:
      float32: for each entry of the batch, KV head and token slot of the entry's row, the sum of the softmax
      weights over all queries and all query heads of that KV head; in a layer with a window of its own by
      position instead of slot, as `gather` has them. Zero for slots that no query attends to,
      for padding and for refused entries; NaN for a stale batch or a traced layer out of range.

    Raises:
      ValueError: for wrong shapes, dtypes or options, at trace time; for a backend without such a kernel.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2, page_size=4)
      >>> cache, batch = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([2]), total_tokens=2)
      >>> cache = jaxkv.append(cache, 0, batch, jnp.zeros((2, 1, 8)), jnp.zeros((2, 1, 8)))
      >>> q = jnp.ones((2, 1, 8))
      >>> out, lse = jaxkv.attend(cache, 0, batch, q, return_lse=True)
      >>> jaxkv.attention_mass(cache, 0, batch, q, lse)[0, 0, :3].tolist()
      [1.5, 0.5, 0.0]
    """
    q, lse = _queries(cache, q, batch), jnp.asarray(lse)
    (place, kind), options = _located(cache, layer, batch, q, scale, window, sink_tokens, softcap)
    with _naming_both_sides(backend):
        return _attention_mass(cache, place, batch, q, lse, kind=kind, backend=backend, options=options)


def _queries(cache: KVCache, q: Array, batch: Batch) -> Array:
    check_cache(cache)
    check_batch(batch)
    q, tokens = jnp.asarray(q), batch.positions.shape[0]
    if q.ndim == 3 and q.shape[0] != tokens:
        raise ValueError(f"q has {q.shape[0]} tokens, the batch {tokens}")
    return q


def _located(
    cache: KVCache, layer, batch: Batch, q: Array, scale, window, sink_tokens, softcap
) -> tuple[Located, Options]:
    """The layer, none where the cache cannot serve the batch, and the options of the call."""
    if isinstance(window, str) and window != "layer":
        raise ValueError(f"window={window!r} must be an integer, None or 'layer'")
    kinds = of_shape(kinds_for(cache.config, layer), "q", head_dim=q.shape[-1])
    if len(kinds) > 1:
        kinds = _named_by(window, kinds)
    located = serve_batch(cache, locate(cache.config, layer, kinds), batch)
    own = kinds[0].window
    if isinstance(window, str):
        window = own
    if own is None:
        window, sink_tokens = _within_policy(batch, window, sink_tokens)
        return located, check_options(scale, window, sink_tokens, softcap)
    options = check_options(scale, own if window is None else window, sink_tokens, softcap)
    if window is None or options.window > own:  # type: ignore[operator]
        raise ValueError(
            f"window={window!r} is wider than the layer's own, {own}: what is beyond is released"
        )
    if options.sink_tokens:
        raise ValueError(
            f"sink_tokens={sink_tokens!r}: a layer with a window of {own} releases its first tokens"
        )
    return located, options


def _named_by(window: int | str | None, kinds: list[Group]) -> list[Group]:
    """The kind that a traced layer is of."""
    named = [kind for kind in kinds if kind.window == window]
    if len(named) != 1:
        windows = ", ".join(str(kind.window) for kind in kinds)
        if named:
            raise ValueError(
                f"layer is traced, and layers with window={window!r} differ in their KV heads; give layer as "
                "a Python int"
            )
        raise ValueError(
            f"window={window!r}: the layer is traced, and layers are of several kinds; window must say which "
            f"one is meant: {windows}"
        )
    return named


def _within_policy(batch: Batch, window: int | None, sink_tokens: int) -> tuple[int | None, int]:
    """The window and sink tokens, the batch's where its window is smaller."""
    if batch.window is not None and (window is None or batch.window < window):
        return batch.window, max(sink_tokens, batch.sink_tokens)
    return window, sink_tokens


def _like_queries(_cache: KVCache, _place, _batch, q: Array, *_) -> tuple[PartitionSpec, PartitionSpec]:
    spec = PartitionSpec(axis_of(q, 0), axis_of(q, 1))
    return spec, spec


def _like_kv_heads(cache: KVCache, *_) -> PartitionSpec:
    return PartitionSpec(None, axis_of(cache.pool.k, 2))


@operation(results=_like_queries, static=("kind", "backend", "options"))
@jax.named_scope("jaxkv.attend")
def _attend(
    cache: KVCache,
    place: Place,
    batch: Batch,
    q: Array,
    sink_logits: Array | None,
    *,
    kind: Group,
    backend: str,
    options: Options,
) -> tuple[Array, Array]:
    pool = view(cache.pool, cache.config, kind)
    out, lse = paged_attention(
        q,
        pool.k,
        pool.v,
        *_rows(cache, place, batch, kind),
        sink_logits=sink_logits,
        v_scales=pool.v_scale,
        return_lse=True,
        **_paged(cache, pool, place, batch, backend, options),
    )
    return out, lse


@operation(results=_like_kv_heads, static=("kind", "backend", "options"))
@jax.named_scope("jaxkv.attention_mass")
def _attention_mass(
    cache: KVCache,
    place: Place,
    batch: Batch,
    q: Array,
    lse: Array,
    *,
    kind: Group,
    backend: str,
    options: Options,
) -> Array:
    pool = view(cache.pool, cache.config, kind)
    rows = _rows(cache, place, batch, kind)
    mass = pallas_kernels.attention_mass(
        q, pool.k, *rows, lse, **_paged(cache, pool, place, batch, backend, options)
    )
    if kind.window is None:
        return mass[..., : cache.config.max_tokens_per_seq]
    _, stored, _ = rows
    start = (
        rows_of(cache.table.positions, clean_slots(batch.seqs, cache.config.max_seqs, once=False)) - stored
    )
    mass = by_position(mass, jnp.where(batch.ok, start, 0), stored, cache.config.max_tokens_per_seq, axis=2)
    # A stale batch does not say where its tokens are now.
    return jnp.where(is_layer(place.index, cache.config.pool_shape[0]), mass, jnp.nan)


def _rows(cache: KVCache, place: Place, batch: Batch, kind: Group) -> tuple[Array, Array, Array]:
    pages = cache.table.pages
    if kind.columns < pages.shape[1]:
        pages = pages[:, : kind.columns]
    return pages, batch.row_lengths[place.group], batch.query_starts


def _paged(
    cache: KVCache, pool: KVPool, place: Place, batch: Batch, backend: str, options: Options
) -> dict[str, Any]:
    max_seqs = cache.config.max_seqs
    return dict(
        # The row of padding and of a refused entry is never read: they see nothing.
        table_rows=place.group * max_seqs + jnp.clip(batch.seqs, 0, max_seqs - 1),
        layer=place.index,
        k_scales=pool.k_scale,
        kv_format=cache.config.storage.name,
        backend=backend,
        **options._asdict(),
    )


@contextmanager
def _naming_both_sides(backend: str) -> Iterator[None]:
    """Adds to a backend's error that a policy may have asked for the mass."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(
            f"backend={backend!r} cannot serve attention_mass, nor policies that need it: {error}"
        ) from error
