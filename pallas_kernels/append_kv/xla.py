"""`append_kv` as a scatter for K and one for V, and for the scales of each."""

import jax.numpy as jnp

from pallas_kernels.quantization import quantize


def append_kv(k_pages, v_pages, k, v, page_ids, offsets, layer, k_scales, v_scales):
    """See `api.append_kv`."""
    num_pages, page_size = k_pages.shape[1], k_pages.shape[3]
    # Padding is past the end and dropped. A negative index would count from the end: it is none.
    page_ids = jnp.where(page_ids < 0, num_pages, page_ids)
    offsets = jnp.where(offsets < 0, page_size, offsets)

    def write(pages, values):
        return pages.at[layer, page_ids, :, offsets].set(values.astype(pages.dtype), mode="drop")

    if k_scales is None:
        return write(k_pages, k), write(v_pages, v)
    (k, k_scale), (v, v_scale) = (quantize(values, k_pages.dtype) for values in (k, v))
    return write(k_pages, k), write(v_pages, v), write(k_scales, k_scale), write(v_scales, v_scale)
