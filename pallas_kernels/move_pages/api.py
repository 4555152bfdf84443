"""`move_pages`: the call, checked."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_integers, check_pool, lacks_dtype
from pallas_kernels.dispatch import choose_backend
from pallas_kernels.move_pages import xla


def move_pages(
    k_pages: Float[Array, "layers pages kv_heads page_size head_dim"],
    v_pages: Float[Array, "layers pages kv_heads page_size head_dim"],
    targets: Int[Array, " pages"],
    *,
    backend: str = "auto",
    interpret: bool | None = None,
) -> tuple[Array, Array]:
    """Moves pages within the pool, K and V, all layers, as if all at once.

        pages      a  b  c  d  .        pages may trade places, and move where another has just left
        targets    1  0  3  4  5
        after      b  a  ?  c  d        what is left where nothing came to is not defined

    Args:
      k_pages, v_pages: the pool.
      targets: where each page goes, no two to one place; any number that is no page for one that
        nobody needs. A page that is its own target costs nothing.
      backend: "auto" or a name.
      interpret: run the kernel in Pallas' interpreter, without a GPU. Default: as `use_backend` says.

    Returns:
      The pool, in place where the caller's `jit` donates it.

    Raises:
      ValueError: for wrong shapes or dtypes.
      NotImplementedError: for a backend that cannot serve the call.
    """
    check_pool(k_pages, v_pages)
    num_pages = k_pages.shape[1]
    targets = jnp.asarray(targets)
    check_integers("targets", targets, (num_pages,))
    targets = jnp.where((targets >= 0) & (targets < num_pages), targets, num_pages).astype(jnp.int32)
    chosen = choose_backend("move_pages", backend, {"xla": None, "triton": lacks_dtype(k_pages)}, interpret)
    if chosen.name == "xla":
        return xla.move_pages(k_pages, v_pages, targets)
    from pallas_kernels.move_pages import triton

    return triton.move_pages(k_pages, v_pages, targets, interpret=chosen.interpret)
