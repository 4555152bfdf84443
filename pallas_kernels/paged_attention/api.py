"""`paged_attention`: the call, checked."""

from functools import partial
from math import sqrt
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import int4
from pallas_kernels.checks import check_floating, check_integers, check_layer, check_pool
from pallas_kernels.device import Device
from pallas_kernels.dispatch import choose_backend
from pallas_kernels.paged_attention import prefixes, xla
from pallas_kernels.paged_attention import tuning as tuning_table
from pallas_kernels.quantization import head_dim_of, is_int4, token_bytes


def paged_attention(
    q: Float[Array, "tokens q_heads head_dim"],
    k_pages: Shaped[Array, "layers pages kv_heads page_size row"],
    v_pages: Shaped[Array, "layers pages kv_heads page_size row"],
    page_table: Int[Array, "rows pages_per_seq"],
    kv_lengths: Int[Array, " seqs"],
    query_starts: Int[Array, " seqs+1"],
    *,
    table_rows: Int[Array, " seqs"] | None = None,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " q_heads"] | None = None,
    k_scales: Shaped[Array, "layers pages kv_heads page_size *words"] | None = None,
    v_scales: Shaped[Array, "layers pages kv_heads page_size *v_words"] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    interpret: bool | None = None,
    shared_prefix: bool | None = None,
    tuning: tuning_table.Tuning | None = None,
    shared_tuning: tuning_table.Tuning | None = None,
) -> Array | tuple[Array, Array]:
    """Attention of each sequence's newest tokens over all of it, causal, ragged, paged.

    The queries of sequence `i` are the rows `query_starts[i]:query_starts[i+1]` of `q`, and stand at
    the last places of its `kv_lengths[i]`. One row a sequence is decode; many are prefill.

    Args:
      q: queries; `q_heads` a multiple of `kv_heads`, query head `h` reads KV head
        `h // (q_heads // kv_heads)`.
      k_pages, v_pages: the pool; of int8, uint8 (E4M3FN) or int32 (words of eight), codes.
      page_table: page ids of a sequence a row, in token order. Entries past its length are never used.
      kv_lengths: places of each sequence; 0 for one that has nothing to see.
      query_starts: first row of each sequence, 0 for the first, and the end of the last; rows past it
        are padding.
      table_rows: row of `page_table` of each sequence. Default: its own number.
      layer: Python int or int32 scalar.
      scale: of the scores, 1e-6 to 1e6. Default: `1 / sqrt(head_dim)`.
      window: a token sees itself and the `window - 1` tokens before it.
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv:2408.00118).
      sinks: a logit for each query head that joins the softmax's denominator (gpt-oss).
      k_scales, v_scales: of a pool of codes.
      return_lse: also return the log-sum-exp of each row's scores, sinks included.
      backend: "auto" or a name.
      interpret: run the kernel in Pallas' interpreter, without a GPU. Default: as `use_backend` says.
      shared_prefix: attend once to the pages that neighbouring sequences begin with (see `prefixes.find`),
        where the page table shows such, and it saves bytes; not with a `window`. None: for up to 16
        queries a sequence, if `seqs - 1` times a full row of the page table is 16 MiB of K and V or more,
        below which one more launch costs as much as sharing could save.
      tuning: how a GPU's kernel cuts up the work. Default: by device and shape.
      shared_tuning: the same for what sequences share.

    Returns:
      `out [tokens, q_heads, head_dim]` in `q`'s dtype, zero for padding rows and empty sequences;
      with `return_lse` also `lse` float32 `[tokens, q_heads]`, natural log, `-inf` for such rows.

    Raises:
      ValueError: for wrong shapes, dtypes or options.
      NotImplementedError: for a backend that cannot serve the call.
    """
    q, sinks = jnp.asarray(q), None if sinks is None else jnp.asarray(sinks)
    k_pages, v_pages, page_table, kv_lengths, query_starts = (
        jnp.asarray(array) for array in (k_pages, v_pages, page_table, kv_lengths, query_starts)
    )
    k_scales, v_scales = (None if scale is None else jnp.asarray(scale) for scale in (k_scales, v_scales))
    if page_table.ndim == 2 and not all(page_table.shape):
        raise ValueError(f"page_table {list(page_table.shape)} must not be empty")
    if table_rows is None:
        table_rows = jnp.arange(page_table.shape[0], dtype=jnp.int32)
    check_pool(k_pages, v_pages, k_scales, v_scales)
    _check(q, k_pages, page_table, table_rows, kv_lengths, query_starts, sinks)
    check_layer(layer, k_pages.shape[0])
    for name, value in (("window", window), ("softcap", softcap), ("scale", scale)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < float("inf")):
            raise ValueError(f"{name}={value!r} must be a positive Python number (it is static)")
        # Far beyond any model. Further out float32 has no room for a score, and its softmax is NaN.
        if name != "window" and value is not None and not 1e-6 <= value <= 1e6:
            raise ValueError(f"{name}={value!r} must lie between 1e-6 and 1e6")
    if window is not None and not isinstance(window, int):
        raise ValueError(f"window={window!r} must be an integer")
    page_table, table_rows, kv_lengths, query_starts = (
        array.astype(jnp.int32) for array in (page_table, table_rows, kv_lengths, query_starts)
    )
    q_dtype, spike_q = q.dtype, None
    if is_int4(k_pages.dtype):
        # Its rows lie rotated, but for the spikes of keys.
        q, spike_q = int4.rotate_queries(q).astype(q.dtype), q
    arrays = q, k_pages, v_pages, page_table, table_rows, kv_lengths, query_starts
    options: dict[str, Any] = dict(
        layer=layer,
        scale=1 / sqrt(q.shape[-1]) if scale is None else scale,
        window=None if window is None else min(window, 2**30),
        softcap=softcap,
        sinks=sinks,
        k_scales=k_scales,
        v_scales=v_scales,
        spike_q=spike_q,
        prefixes=None,
    )
    width = token_bytes(k_pages.shape[2], q.shape[2], k_pages.dtype)
    max_keys = page_table.shape[1] * k_pages.shape[3]
    if shared_prefix is None:
        shared_prefix = prefixes.could_pay(kv_lengths.shape[0], q.shape[0], max_keys, width)
    if shared_prefix and window is None:
        options["prefixes"] = partial(
            prefixes.find,
            page_table,
            table_rows,
            kv_lengths,
            query_starts,
            page_size=k_pages.shape[3],
            token_bytes=width,
            partial_bytes=4 * q.shape[1] * (q.shape[2] + 2),
        )
    device = Device.current()
    lacks = {"xla": None, "triton": tuning_table.lacks(device, q.shape[2], k_pages, q)}
    chosen = choose_backend("paged_attention", backend, lacks, interpret)
    if chosen.name == "xla":
        out, lse = xla.paged_attention(*arrays, **options)
    else:
        from pallas_kernels.paged_attention import triton

        shape: dict[str, Any] = dict(
            tokens=q.shape[0],
            seqs=kv_lengths.shape[0],
            group=q.shape[1] // k_pages.shape[2],
            head_dim=q.shape[2],
            dtype=k_pages.dtype,
            q_dtype=q.dtype,
        )
        out, lse = triton.paged_attention(
            *arrays,
            **options,
            tuning=tuning or tuning_table.choose(device, **shape),
            shared_tuning=shared_tuning or tuning_table.choose_shared(device, **shape),
            interpret=chosen.interpret,
        )
    if spike_q is not None:
        out = int4.rotate_queries(out).astype(q_dtype)
    return (out, lse) if return_lse else out


def _check(q, k_pages, page_table, table_rows, kv_lengths, query_starts, sinks) -> None:
    check_floating("q", q)
    kv_heads, head_dim = k_pages.shape[2], head_dim_of(k_pages)
    if q.ndim != 3 or q.shape[2] != head_dim:
        raise ValueError(f"q must be [tokens, q_heads, head_dim={head_dim}], not {list(q.shape)}")
    if q.shape[0] == 0 or q.shape[1] == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"q {list(q.shape)} must have tokens, and a multiple of {kv_heads} query heads")
    if page_table.ndim != 2:
        raise ValueError(f"page_table must be [rows, pages_per_seq], not {list(page_table.shape)}")
    if table_rows.ndim != 1:
        raise ValueError(f"table_rows must be [seqs], not {list(table_rows.shape)}")
    seqs = table_rows.shape[0]
    if seqs == 0:
        raise ValueError("table_rows must name a sequence")
    check_integers("page_table", page_table, page_table.shape)
    check_integers("table_rows", table_rows, (seqs,))
    check_integers("kv_lengths", kv_lengths, (seqs,))
    check_integers("query_starts", query_starts, (seqs + 1,))
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks must be [q_heads={q.shape[1]}], not {list(sinks.shape)}")
