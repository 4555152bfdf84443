"""`append_kv`: checks its arguments."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.append_kv.call import Call
from pallas_kernels.checks import as_int32, check_floating, check_integers, check_layer, check_pool
from pallas_kernels.dispatch import serve


def append_kv(
    k_pages: Shaped[Array, "layers pages kv_heads page_size row"],
    v_pages: Shaped[Array, "layers pages kv_heads page_size row"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    page_ids: Int[Array, " tokens"],
    offsets: Int[Array, " tokens"],
    *,
    layer: int | Int[Array, ""] = 0,
    k_scales: Shaped[Array, "layers pages kv_heads k_slots *words"] | None = None,
    v_scales: Shaped[Array, "layers pages kv_heads v_slots *v_words"] | None = None,
    kv_format: str | None = None,
    backend: str = "auto",
    interpret: bool | None = None,
) -> tuple[Array, ...]:
    """Writes each token's K and V to `(page_ids, offsets)` of one layer.

    Args:
      k_pages, v_pages: the pool.
      k, v: this step's keys and values, converted to the pool's dtype or quantized; see
        `pallas_kernels.formats`.
      page_ids: page of each token; a token whose page is out of range is not written.
      offsets: token slot within the page.
      layer: Python int or int32 scalar; for a traced layer out of range nothing is written.
      k_scales, v_scales: of a pool of codes.
      kv_format: name of the storage format. Default: by the dtype of the pages, see `formats.of`.
      backend: "auto" or a name.
      interpret: run the kernel in Pallas' interpreter, without a GPU. Default: as set by `use_backend`.

    Returns:
      `(k_pages, v_pages)`, and `k_scales, v_scales` of a pool of codes, in place if the caller's
      `jit` donates them.

    Raises:
      ValueError: for wrong shapes or dtypes.
      NotImplementedError: for a backend that does not support the call.
    """
    k, v, page_ids, offsets = (jnp.asarray(array) for array in (k, v, page_ids, offsets))
    pool = check_pool(k_pages, v_pages, k_scales, v_scales, kv_format)
    check_layer(layer, k_pages.shape[0])
    kv_heads, head_dim = k_pages.shape[2], pool.head_dim
    for name, array in (("k", k), ("v", v)):
        check_floating(name, array)
        if array.shape != (*page_ids.shape, kv_heads, head_dim):
            raise ValueError(
                f"{name} must be [tokens={page_ids.shape[0]}, kv_heads={kv_heads}, head_dim={head_dim}], "
                f"not {list(array.shape)}"
            )
    check_integers("page_ids", page_ids, k.shape[:1])
    check_integers("offsets", offsets, k.shape[:1])
    page_ids, offsets = as_int32(page_ids), as_int32(offsets)
    call = Call(pool, k, v, page_ids, offsets, layer)
    return serve("append_kv", call, backend=backend, interpret=interpret)
