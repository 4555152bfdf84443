"""`move_pages`: checks its arguments."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.checks import as_int32, check_integers, check_pool
from pallas_kernels.dispatch import serve
from pallas_kernels.move_pages.call import Call


def move_pages(
    k_pages: Shaped[Array, "layers pages kv_heads page_size row"],
    v_pages: Shaped[Array, "layers pages kv_heads page_size row"],
    targets: Int[Array, " pages"],
    *,
    k_scales: Shaped[Array, "layers pages kv_heads k_slots *words"] | None = None,
    v_scales: Shaped[Array, "layers pages kv_heads v_slots *v_words"] | None = None,
    kv_format: str | None = None,
    backend: str = "auto",
    interpret: bool | None = None,
) -> tuple[Array, ...]:
    """Moves pages within the pool, K and V, all layers, as if all at once.

        pages      a  b  c  d  .        pages may be exchanged, and move to pages that others leave
        targets    1  0  3  4  5
        after      b  a  ?  c  d        a page that no other moves to is undefined

    Args:
      k_pages, v_pages: the pool.
      targets: new page id of each page, all different; out of range for a page whose content is not
        needed. A page that is its own target costs nothing.
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
    num_pages = k_pages.shape[1]
    targets = jnp.asarray(targets)
    check_integers("targets", targets, (num_pages,))
    targets = as_int32(targets)
    targets = jnp.where((targets >= 0) & (targets < num_pages), targets, num_pages)
    return serve("move_pages", Call(pool, targets), backend=backend, interpret=interpret)
