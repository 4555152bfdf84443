"""`copy_pages`: checks its arguments."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.checks import as_int32, check_integers, check_pool
from pallas_kernels.copy_pages.call import Call
from pallas_kernels.dispatch import serve


def copy_pages(
    k_pages: Shaped[Array, "layers pages kv_heads page_size row"],
    v_pages: Shaped[Array, "layers pages kv_heads page_size row"],
    sources: Int[Array, " copies"],
    destinations: Int[Array, " copies"],
    *,
    k_scales: Shaped[Array, "layers pages kv_heads k_slots *words"] | None = None,
    v_scales: Shaped[Array, "layers pages kv_heads v_slots *v_words"] | None = None,
    kv_format: str | None = None,
    backend: str = "auto",
    interpret: bool | None = None,
) -> tuple[Array, ...]:
    """Copies pages within the pool, K and V, all layers.

    Args:
      k_pages, v_pages: the pool.
      sources: pages to read.
      destinations: pages to write, each at most once and none of them a source. If the source or the
        destination is out of range, nothing is copied, at no cost.
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
    pool = check_pool(k_pages, v_pages, k_scales, v_scales, kv_format)
    sources, destinations = (jnp.asarray(ids) for ids in (sources, destinations))
    check_integers("sources", sources, sources.shape[:1])
    check_integers("destinations", destinations, sources.shape[:1])
    sources, destinations = as_int32(sources), as_int32(destinations)
    return serve("copy_pages", Call(pool, sources, destinations), backend=backend, interpret=interpret)
