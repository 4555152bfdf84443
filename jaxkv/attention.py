"""Attention of this step's tokens over their sequences."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxkv.fingerprint import layer_for
from jaxkv.operation import axis_of, operation
from jaxkv.state import Batch, KVCache
from pallas_kernels import attention_mass, paged_attention
from pallas_kernels.checks import Options, check_options
from pallas_kernels.ordering import after


@overload
def attend(
    cache: KVCache,
    layer: int | Int[Array, ""],
    batch: Batch,
    q: Float[Array, "tokens q_heads head_dim"],
    *,
    scale: float | None = ...,
    window: int | None = ...,
    sink_tokens: int = ...,
    softcap: float | None = ...,
    sinks: Float[Array, " q_heads"] | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
    return_mass: Literal[False] = ...,
) -> Array: ...


@overload
def attend(
    cache: KVCache,
    layer: int | Int[Array, ""],
    batch: Batch,
    q: Float[Array, "tokens q_heads head_dim"],
    *,
    scale: float | None = ...,
    window: int | None = ...,
    sink_tokens: int = ...,
    softcap: float | None = ...,
    sinks: Float[Array, " q_heads"] | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
    return_mass: Literal[False] = ...,
) -> tuple[Array, Array]: ...


@overload
def attend(
    cache: KVCache,
    layer: int | Int[Array, ""],
    batch: Batch,
    q: Float[Array, "tokens q_heads head_dim"],
    *,
    scale: float | None = ...,
    window: int | None = ...,
    sink_tokens: int = ...,
    softcap: float | None = ...,
    sinks: Float[Array, " q_heads"] | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
    return_mass: Literal[True],
) -> tuple[Array, Array]: ...


@overload
def attend(
    cache: KVCache,
    layer: int | Int[Array, ""],
    batch: Batch,
    q: Float[Array, "tokens q_heads head_dim"],
    *,
    scale: float | None = ...,
    window: int | None = ...,
    sink_tokens: int = ...,
    softcap: float | None = ...,
    sinks: Float[Array, " q_heads"] | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
    return_mass: Literal[True],
) -> tuple[Array, Array, Array]: ...


def attend(
    cache: KVCache,
    layer: int | Int[Array, ""],
    batch: Batch,
    q: Float[Array, "tokens q_heads head_dim"],
    *,
    scale: float | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    softcap: float | None = None,
    sinks: Float[Array, " q_heads"] | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_mass: bool = False,
) -> Array | tuple[Array, ...]:
    """Causal attention of each token over its own sequence, up to and with itself.

    Neighbours in the batch that begin with the same pages, as forks do, attend to them once, wherever that
    reads fewer bytes: `n` sequences that share `s` tokens save `(n - 1) * s` tokens' K and V, which must be
    more than the partial results it takes to merge. It is looked for with up to 16 tokens a sequence, without
    a `window`, where the full rows of all sequences but one are 16 MiB of a layer or more.

    For inference: the loop over the pages has no reverse-mode derivative.

    Args:
      cache: the cache after this layer's `append`.
      layer: Python int or traced int32. Of a traced one that is no layer every result is NaN.
      batch: of this step. Once the page table has changed it is stale, and every result is NaN.
      q: queries, after RoPE; `q_heads` a multiple of the cache's KV heads.
      scale: of the scores. Default: `1 / sqrt(head_dim)`.
      window: a token sees itself and the `window - 1` places before it. The batch's own holds, with its
        `sink_tokens`, where it is smaller.
      sink_tokens: and its sequence's first so many places, which the window does not hide (StreamingLLM,
        arXiv:2309.17453). Without a `window` here or there it must be 0.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      sinks: a logit for each query head that joins the softmax's denominator.
      backend: "auto", "xla", or "triton" on a GPU.
      return_lse: also return the log-sum-exp of the scores, for merging partial results.
      return_mass: also return what attention each place received, which is one more pass over K.

    Returns:
      `out [tokens, q_heads, head_dim]` in `q`'s dtype; zeros for padding and refused sequences.
      With `return_lse` also float32 `[tokens, q_heads]`, `-inf` for those.
      With `return_mass` also float32 `[entries, kv_heads, max_tokens]`: for each entry of the batch, KV head
      and place of its row, the softmax weights of all queries and query heads of that KV head, summed; zero
      for places that none of them sees.

    Raises:
      ValueError: for wrong shapes, dtypes or options, at trace time; for `return_mass` on a backend that has
        no kernel for it.
      NotImplementedError: for a backend that cannot serve the call.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2)
      >>> cache, batch = jaxkv.allocate(jaxkv.init(config), jnp.array([0]), jnp.array([1]))
      >>> cache = jaxkv.append(cache, 0, batch, jnp.ones((1, 1, 8)), jnp.full((1, 1, 8), 3.0))
      >>> float(jaxkv.attend(cache, 0, batch, jnp.ones((1, 2, 8)))[0, 1, 0])
      3.0
    """
    layer = layer_for(cache, layer, batch)
    q = jnp.asarray(q)
    tokens = batch.positions.shape[0]
    if q.ndim == 3 and q.shape[0] != tokens:
        raise ValueError(f"q must have the batch's {tokens} tokens, not {q.shape[0]}")
    if batch.window is not None and (window is None or batch.window < window):
        window, sink_tokens = batch.window, max(sink_tokens, batch.sink_tokens)
    options = check_options(scale, window, sink_tokens, softcap)
    sinks = None if sinks is None else jnp.asarray(sinks)
    out, lse, mass = _attend(
        cache, layer, batch, q, sinks, with_mass=return_mass, backend=backend, options=options
    )
    results = (out, *((lse,) if return_lse else ()), *((mass,) if mass is not None else ()))
    return results if len(results) > 1 else out


def _specs(cache: KVCache, _layer, _batch, q: Array, _sinks) -> tuple[PartitionSpec, ...]:
    """A result for each query is sharded as they are; the mass has the cache's heads."""
    like_q = PartitionSpec(axis_of(q, 0), axis_of(q, 1))
    return like_q, like_q, PartitionSpec(None, axis_of(cache.pool.k, 2))


@operation(results=_specs, static=("with_mass", "backend", "options"))
@jax.named_scope("jaxkv.attend")
def _attend(
    cache: KVCache,
    layer: Array,
    batch: Batch,
    q: Array,
    sinks: Array | None,
    *,
    with_mass: bool,
    backend: str,
    options: Options,
) -> tuple[Array, Array, Array | None]:
    """The output, the log-sum-exp and, if asked for, the mass."""
    paged: dict[str, Any] = dict(
        # The row of padding and of a refused entry is never read: they see nothing.
        table_rows=jnp.clip(batch.seqs, 0, cache.config.max_seqs - 1),
        layer=layer,
        k_scales=cache.pool.k_scale,
        kv_format=cache.config.storage.name,
        backend=backend,
        **options._asdict(),
    )
    rows = cache.table.pages, batch.kv_lengths, batch.query_starts
    with _naming_both_sides(backend) if with_mass else nullcontext():
        k, v, v_scales = cache.pool.k, cache.pool.v, cache.pool.v_scale
        out, lse = paged_attention(q, k, v, *rows, sinks=sinks, v_scales=v_scales, return_lse=True, **paged)
        if not with_mass:
            return out, lse, None
        mass = attention_mass(q, k, *rows, lse, **paged)
        # The next layer's append waits for the output, and so for this pass over K.
        return after(out, mass), lse, mass


@contextmanager
def _naming_both_sides(backend: str) -> Iterator[None]:
    """What a backend lacks for the mass; who asked for it may be a policy, far from here."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(
            f"backend={backend!r} cannot serve return_mass, nor policies that need attention mass: {error}"
        ) from error
