"""`paged_attention`: checks its arguments."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.checks import check_layer, check_options, check_pool, check_queries
from pallas_kernels.dispatch import serve
from pallas_kernels.paged_attention import prefixes
from pallas_kernels.paged_attention.call import Call, Scoring, Sequences
from pallas_kernels.paged_attention.triton.tuning import Tuning


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
    sink_tokens: int = 0,
    softcap: float | None = None,
    sink_logits: Float[Array, " q_heads"] | None = None,
    k_scales: Shaped[Array, "layers pages kv_heads k_slots *words"] | None = None,
    v_scales: Shaped[Array, "layers pages kv_heads v_slots *v_words"] | None = None,
    return_lse: bool = False,
    kv_format: str | None = None,
    backend: str = "auto",
    interpret: bool | None = None,
    shared_prefix: bool | None = None,
    tuning: Tuning | None = None,
    shared_tuning: Tuning | None = None,
) -> Array | tuple[Array, Array]:
    """Causal attention of each sequence's newest tokens over the whole sequence.

    The queries of sequence `i` are the rows `query_starts[i]:query_starts[i+1]` of `q`, for the last of its
    `kv_lengths[i]` token slots. One row per sequence is decode; many are prefill.

    Args:
      q: queries; `q_heads` a multiple of `kv_heads`, query head `h` reads KV head
        `h // (q_heads // kv_heads)`.
      k_pages, v_pages: the pool.
      page_table: page ids of a sequence per row, in token order. Entries past its length are never used.
      kv_lengths: token slots of each sequence; 0 for one without keys.
      query_starts: first row of each sequence, 0 for the first, and the end of the last; rows past it
        are padding.
      table_rows: row of `page_table` of each sequence. Default: its index.
      layer: Python int or int32 scalar; results are NaN for a traced layer out of range.
      scale: factor of the scores, 1e-6 to 1e6. Default: `1 / sqrt(head_dim)`.
      window: a token attends to itself and the `window - 1` tokens before it.
      sink_tokens: first tokens of a sequence, attended to whatever the window (StreamingLLM,
        arXiv:2309.17453).
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv:2408.00118).
      sink_logits: one logit per query head, added to the softmax's denominator (gpt-oss).
      k_scales, v_scales: of a pool of codes.
      return_lse: also return the log-sum-exp of each row's scores, including `sink_logits`.
      kv_format: name of the storage format. Default: by the dtype of the pages, see `formats.of`.
      backend: "auto" or a name.
      interpret: run the kernel in Pallas' interpreter, without a GPU. Default: as set by `use_backend`.
      shared_prefix: read pages that adjacent sequences begin with once (see `prefixes.find`), where the
        page table has such pages and it saves bytes; not with a `window`. None: for up to 16 queries per
        sequence, if `seqs - 1` times a full row of the page table is at least 16 MiB of K and V; below that,
        the extra launch costs as much as sharing could save.
      tuning: how a GPU's kernel divides the work. Default: by device and shape.
      shared_tuning: the same for shared prefixes.

    Returns:
      `out [tokens, q_heads, head_dim]` in `q`'s dtype, zero for padding rows and empty sequences;
      with `return_lse` also `lse` float32 `[tokens, q_heads]`, natural log, `-inf` for such rows.
      A score of -inf, from a product below float32's range, has weight zero; if a row has no other scores,
      it is treated as a row without keys.

    Raises:
      ValueError: for wrong shapes, dtypes or options.
      NotImplementedError: for a backend that does not support the call.
    """
    q, sink_logits = jnp.asarray(q), None if sink_logits is None else jnp.asarray(sink_logits)
    k_pages, v_pages, page_table, kv_lengths, query_starts = (
        jnp.asarray(array) for array in (k_pages, v_pages, page_table, kv_lengths, query_starts)
    )
    k_scales, v_scales = (None if scale is None else jnp.asarray(scale) for scale in (k_scales, v_scales))
    if table_rows is None:
        table_rows = jnp.arange(page_table.shape[0], dtype=jnp.int32)
    pool = check_pool(k_pages, v_pages, k_scales, v_scales, kv_format)
    check_queries(q, pool, page_table, table_rows, kv_lengths, query_starts)
    if sink_logits is not None and sink_logits.shape != q.shape[1:2]:
        raise ValueError(f"sink_logits must be [q_heads={q.shape[1]}], not {list(sink_logits.shape)}")
    check_layer(layer, k_pages.shape[0])
    options = check_options(scale, window, sink_tokens, softcap)
    scoring = Scoring.of(options, q.shape[2], page_table.shape[1] * pool.shape[3])
    page_table, table_rows, kv_lengths, query_starts = (
        array.astype(jnp.int32) for array in (page_table, table_rows, kv_lengths, query_starts)
    )
    max_keys, storage = page_table.shape[1] * pool.shape[3], pool.storage
    width = storage.token_bytes(pool.shape[2], q.shape[2])
    if shared_prefix is None:
        shared_prefix = prefixes.could_pay(kv_lengths.shape[0], q.shape[0], max_keys, width)
    finds = partial(
        prefixes.find,
        page_table,
        table_rows,
        kv_lengths,
        query_starts,
        page_size=pool.shape[3],
        token_bytes=width,
        partial_bytes=4 * q.shape[1] * (q.shape[2] + 2),
    )
    call = Call(
        q=q,
        queries=storage.queries(q),
        pool=pool,
        sequences=Sequences(page_table, table_rows, kv_lengths, query_starts),
        layer=layer,
        scoring=scoring,
        sinks=sink_logits,
        prefixes=finds if shared_prefix and scoring.window is None else None,
        tuning=tuning,
        shared_tuning=shared_tuning,
    )
    out, lse = serve("paged_attention", call, backend=backend, interpret=interpret)
    out = storage.outputs(out, q.dtype)
    return (out, lse) if return_lse else out
