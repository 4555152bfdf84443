"""`attention_mass`: checks its arguments."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.attention_mass.call import Call
from pallas_kernels.checks import (
    as_layer,
    check_keys,
    check_layer,
    check_options,
    check_queries,
    is_layer,
)
from pallas_kernels.dispatch import serve
from pallas_kernels.paged_attention.call import Scoring, Sequences
from pallas_kernels.paged_attention.triton.tuning import Tuning


def attention_mass(
    q: Float[Array, "tokens q_heads head_dim"],
    k_pages: Shaped[Array, "layers pages kv_heads page_size row"],
    page_table: Int[Array, "rows pages_per_seq"],
    kv_lengths: Int[Array, " seqs"],
    query_starts: Int[Array, " seqs+1"],
    lse: Float[Array, "tokens q_heads"],
    *,
    table_rows: Int[Array, " seqs"] | None = None,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    softcap: float | None = None,
    k_scales: Shaped[Array, "layers pages kv_heads k_slots *words"] | None = None,
    kv_format: str | None = None,
    backend: str = "auto",
    interpret: bool | None = None,
    tuning: Tuning | None = None,
) -> Float[Array, "seqs kv_heads max_tokens"]:
    """The softmax weights of `paged_attention`, summed over a sequence's queries and a KV head's group.

    A separate pass over K, using the log-sum-exp of attention, so that attention alone costs no more.

    Args:
      q, k_pages, page_table, kv_lengths, query_starts: as in `paged_attention`.
      table_rows, layer, scale, window, sink_tokens, softcap, k_scales: as there.
      lse: as `paged_attention` returns it; it includes the share of `sink_logits`, which no key receives.
      kv_format: name of the storage format. Default: by the dtype of the pages, see `formats.of`.
      backend: "auto" or a name.
      interpret: run the kernel in Pallas' interpreter, without a GPU. Default: as set by `use_backend`.
      tuning: how a GPU's kernel divides the work. Default: by device and shape.

    Returns:
      float32; `max_tokens` is the size of a row of the page table. Zero for token slots that no query attends
      to, such as those past the length, and for empty sequences; NaN for a traced layer out of range. For
      scores above 2**24 the log-sum-exp has a rounding error of more than 1; then every score within that
      error of the largest counts as the largest.

    Raises:
      ValueError: for wrong shapes, dtypes or options.
      NotImplementedError: for a backend that does not support the call.
    """
    q, k_pages, page_table, kv_lengths, query_starts, lse = (
        jnp.asarray(array) for array in (q, k_pages, page_table, kv_lengths, query_starts, lse)
    )
    k_scales = None if k_scales is None else jnp.asarray(k_scales)
    if table_rows is None:
        table_rows = jnp.arange(page_table.shape[0], dtype=jnp.int32)
    pool = check_keys(k_pages, k_scales, kv_format)
    check_queries(q, pool, page_table, table_rows, kv_lengths, query_starts)
    if lse.shape != q.shape[:2] or lse.dtype != jnp.float32:
        raise ValueError(f"lse must be float32{list(q.shape[:2])}, not {lse.dtype}{list(lse.shape)}")
    check_layer(layer, k_pages.shape[0])
    options = check_options(scale, window, sink_tokens, softcap)
    scoring = Scoring.of(options, q.shape[2], page_table.shape[1] * pool.shape[3])
    page_table, table_rows, kv_lengths, query_starts = (
        array.astype(jnp.int32) for array in (page_table, table_rows, kv_lengths, query_starts)
    )
    num_layers = pool.shape[0]
    call = Call(
        q=q,
        queries=pool.storage.queries(q),
        pool=pool,
        sequences=Sequences(page_table, table_rows, kv_lengths, query_starts),
        layer=jnp.clip(as_layer(layer), 0, num_layers - 1),
        scoring=scoring,
        lse=lse,
        tuning=tuning,
    )
    mass = serve("attention_mass", call, backend=backend, interpret=interpret)
    return jnp.where(is_layer(layer, num_layers), mass, jnp.nan)
