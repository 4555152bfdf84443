"""`append_kv` as a scatter for K and one for V, and for the scales of each."""

import jax.numpy as jnp

from pallas_kernels.checks import is_layer, pool_arrays


def append_kv(k_pages, v_pages, k, v, page_ids, offsets, layer, k_scales, v_scales, storage):
    """See `api.append_kv`."""
    num_pages, page_size = k_pages.shape[1], k_pages.shape[3]
    # Padding is past the end and dropped. A negative index would count from the end: it is none.
    wanted = (page_ids >= 0) & is_layer(layer, k_pages.shape[0])
    page_ids = jnp.where(wanted, page_ids, num_pages)
    offsets = jnp.where(offsets < 0, page_size, offsets)

    def write(pages, values):
        return pages.at[layer, page_ids, :, offsets].set(values, mode="drop")

    pool = pool_arrays(k_pages, v_pages, k_scales, v_scales)
    rows = storage.encode_pair(k, v)
    return tuple(write(pages, values) for pages, values in zip(pool, rows, strict=True))
