"""`copy_pages`: the call, checked."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_integers, check_pool, lacks_dtype
from pallas_kernels.copy_pages import xla
from pallas_kernels.dispatch import choose_backend


def copy_pages(
    k_pages: Float[Array, "layers pages kv_heads page_size head_dim"],
    v_pages: Float[Array, "layers pages kv_heads page_size head_dim"],
    sources: Int[Array, " copies"],
    destinations: Int[Array, " copies"],
    *,
    backend: str = "auto",
    interpret: bool | None = None,
) -> tuple[Array, Array]:
    """Copies pages within the pool, K and V, all layers.

    Args:
      k_pages, v_pages: the pool.
      sources: pages to read.
      destinations: pages to write, each at most once and none of them a source. A source or a
        destination that is no page means no copy, which costs nothing.
      backend: "auto" or a name.
      interpret: run the kernel in Pallas' interpreter, without a GPU. Default: as `use_backend` says.

    Returns:
      The pool, in place where the caller's `jit` donates it.

    Raises:
      ValueError: for wrong shapes or dtypes.
      NotImplementedError: for a backend that cannot serve the call.
    """
    check_pool(k_pages, v_pages)
    sources, destinations = (jnp.asarray(ids) for ids in (sources, destinations))
    check_integers("sources", sources, sources.shape[:1])
    check_integers("destinations", destinations, sources.shape[:1])
    sources, destinations = sources.astype(jnp.int32), destinations.astype(jnp.int32)
    lacks = {"xla": None, "triton": lacks_dtype(k_pages)}
    chosen = choose_backend("copy_pages", backend, lacks, interpret)
    if chosen.name == "xla":
        return xla.copy_pages(k_pages, v_pages, sources, destinations)
    from pallas_kernels.copy_pages import triton

    return triton.copy_pages(k_pages, v_pages, sources, destinations, interpret=chosen.interpret)
