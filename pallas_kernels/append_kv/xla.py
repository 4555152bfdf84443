"""`append_kv` as one scatter for K and one for V."""

import jax.numpy as jnp


def append_kv(k_pages, v_pages, k, v, page_ids, offsets, layer):
    """See `api.append_kv`."""

    num_pages, page_size = k_pages.shape[1], k_pages.shape[3]
    # Padding is past the end and dropped. A negative index would count from the end: it is none.
    page_ids = jnp.where(page_ids < 0, num_pages, page_ids)
    offsets = jnp.where(offsets < 0, page_size, offsets)

    def write(pages, values):
        return pages.at[layer, page_ids, :, offsets].set(values.astype(pages.dtype), mode="drop")

    return write(k_pages, k), write(v_pages, v)
