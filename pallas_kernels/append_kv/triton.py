"""`append_kv` in Pallas Triton: one launch writes K and V of all tokens, in place.

Depending on the format, codes and scales are computed in the kernel or before it; see `formats.Format.rows`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import cost
from pallas_kernels.append_kv.call import Call
from pallas_kernels.checks import as_layer
from pallas_kernels.device import Device
from pallas_kernels.formats import Format
from pallas_kernels.launch import launch
from pallas_kernels.sizes import next_power_of_two

# Elements of K, and of V, per program: 32 per thread.
_BLOCK = 4096


def lacks(call: Call) -> str | None:
    """What the kernel lacks for these pages on this device, if anything."""
    return call.pool.storage.lacks(Device.current(), call.pool.shape[4])


def run(call: Call, *, interpret: bool) -> tuple[Array, ...]:
    """See `api.append_kv`."""
    (tokens, kv_heads, head_dim), storage = call.k.shape, call.pool.storage
    if tokens == 0:
        return call.pool.arrays
    pool = *(storage.write_view(pages) for pages in call.pool.pages), *call.pool.scales
    rows = storage.rows(call.k, call.v)
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
            tokens=tokens, kv_heads=kv_heads, head_dim=head_dim, dtype=call.k.dtype, storage=storage
        ),
        aliases={3 + len(rows) + i: i for i in range(len(pool))},
    )
    written = append(as_layer(call.layer).reshape(1), call.page_ids, call.offsets, *rows, *pool)
    return tuple(storage.from_write_view(array) for array in written[:2]) + written[2:]


def _append(layer_ref, page_ref, offset_ref, *refs, heads: int, rows: int, storage: Format):
    pool = refs[(len(refs) + rows) // 2 :]
    scales = pool[rows:]
    block, token = pl.program_id(0), pl.program_id(1)
    layer, page, offset = layer_ref[0], page_ref[token], offset_ref[token]
    head = block * heads + lax.iota(jnp.int32, heads)
    # Tokens of a page, slot or layer out of range are padding.
    in_pool = (page >= 0) & (page < pool[0].shape[1]) & (offset >= 0) & (offset < pool[0].shape[3])
    in_pool &= (layer >= 0) & (layer < pool[0].shape[0])
    for i, (new, pages) in enumerate(zip(refs[:rows], pool, strict=False)):
        dims = next_power_of_two(new.shape[2])
        dim = lax.iota(jnp.int32, dims)
        exists = (head < new.shape[1])[:, None] & (dim < new.shape[2])[None, :]
        zero = jnp.zeros((), new.dtype)
        values = plgpu.load(new.at[token, head[:, None], dim[None, :]], mask=exists, other=zero)
        index, wanted = dim, exists & in_pool
        if scales:
            values, scale = storage.encode_in_kernel(values)
            has_scale = in_pool & (head < new.shape[1])
            plgpu.store(scales[i].at[layer, page, head, offset], scale, mask=has_scale)
            index = lax.iota(jnp.int32, values.shape[1])
            wanted = has_scale[:, None] & (index < pages.shape[4])[None, :]
        at = pages.at[layer, page, head[:, None], offset, index[None, :]]
        plgpu.store(at, values.astype(pages.dtype), mask=wanted)
