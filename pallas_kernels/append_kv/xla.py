"""`append_kv` as one scatter for each of K, V and their scales."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.append_kv.call import Call
from pallas_kernels.checks import is_layer


def lacks(call: Call) -> str | None:
    """None: XLA supports every call."""


def run(call: Call, *, interpret: bool) -> tuple[Array, ...]:
    """See `api.append_kv`."""
    del interpret
    layer, page_ids, offsets = call.layer, call.page_ids, call.offsets
    num_layers, num_pages, _, page_size, _ = call.pool.shape
    # Padding is out of range and dropped. Negative indices would count from the end, so they become padding.
    # Scales may have more slots than `page_size`, so offsets past that do too.
    wanted = (page_ids >= 0) & (offsets >= 0) & (offsets < page_size) & is_layer(layer, num_layers)
    page_ids = jnp.where(wanted, page_ids, num_pages)

    def write(pages, values):
        return pages.at[layer, page_ids, :, offsets].set(values, mode="drop")

    rows = call.pool.storage.encode_pair(call.k, call.v)
    return tuple(write(pages, values) for pages, values in zip(call.pool.arrays, rows, strict=True))
