"""`append_kv` in Pallas Triton: one launch writes K and V of all tokens, into the pool's own memory.

Codes are made in the kernel, or come as words, and so do their scales: see `formats.Format.rows`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import cost
from pallas_kernels.checks import as_layer, pool_arrays
from pallas_kernels.formats import Format
from pallas_kernels.launch import launch
from pallas_kernels.sizes import next_power_of_two

# Numbers of K that a program holds, and as many of V: 32 a thread.
_BLOCK = 4096


def append_kv(
    k_pages,
    v_pages,
    k,
    v,
    page_ids,
    offsets,
    layer,
    k_scales,
    v_scales,
    storage: Format,
    *,
    interpret: bool,
):
    """See `api.append_kv`."""
    tokens, kv_heads, head_dim = k.shape
    if tokens == 0:
        return pool_arrays(k_pages, v_pages, k_scales, v_scales)
    pool = pool_arrays(storage.write_view(k_pages), storage.write_view(v_pages), k_scales, v_scales)
    rows = storage.rows(k, v)
    heads = min(next_power_of_two(kv_heads), max(1, _BLOCK // next_power_of_two(head_dim)))
    append = launch(
        partial(_append, heads=heads, rows=len(rows), storage=storage),
        grid=(-(-kv_heads // heads), tokens),
        out_shape=tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in pool),
        name="append_kv",
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        cost=cost.append_kv(
            tokens=tokens, kv_heads=kv_heads, head_dim=head_dim, dtype=k.dtype, storage=storage
        ),
        aliases={3 + len(rows) + i: i for i in range(len(pool))},
    )
    written = append(as_layer(layer).reshape(1), page_ids, offsets, *rows, *pool)
    return tuple(storage.from_write_view(array) for array in written[:2]) + written[2:]


def _append(layer_ref, page_ref, offset_ref, *refs, heads: int, rows: int, storage: Format):
    pool = refs[(len(refs) + rows) // 2 :]
    scales = pool[rows:]
    block, token = pl.program_id(0), pl.program_id(1)
    layer, page, offset = layer_ref[0], page_ref[token], offset_ref[token]
    head = block * heads + lax.iota(jnp.int32, heads)
    # A page past the end is padding; so is what a place that is no place would write.
    in_pool = (page >= 0) & (page < pool[0].shape[1]) & (offset >= 0) & (offset < pool[0].shape[3])
    in_pool &= (layer >= 0) & (layer < pool[0].shape[0])
    for i, (new, pages) in enumerate(zip(refs[:rows], pool, strict=False)):
        dims = next_power_of_two(new.shape[2])
        dim = lax.iota(jnp.int32, dims)
        exists = (head < new.shape[1])[:, None] & (dim < new.shape[2])[None, :]
        zero = jnp.zeros((), new.dtype)
        values = plgpu.load(new.at[token, head[:, None], dim[None, :]], mask=exists, other=zero)
        number, wanted = dim, exists & in_pool
        if scales:
            values, scale = storage.encode_in_kernel(values)
            has_scale = in_pool & (head < new.shape[1])
            plgpu.store(scales[i].at[layer, page, head, offset], scale, mask=has_scale)
            number = lax.iota(jnp.int32, values.shape[1])
            wanted = has_scale[:, None] & (number < pages.shape[4])[None, :]
        at = pages.at[layer, page, head[:, None], offset, number[None, :]]
        plgpu.store(at, values.astype(pages.dtype), mask=wanted)
