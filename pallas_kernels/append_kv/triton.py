"""`append_kv` in Pallas Triton: one launch writes K and V of all tokens, into the pool's own memory.

Codes of a byte are made in the kernel. Those of four bits come as words, and so do their scales.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import cost
from pallas_kernels.checks import as_layer, pool_arrays
from pallas_kernels.launch import launch
from pallas_kernels.quantization import WORD, as_words, encode, from_words, is_int4, quantize
from pallas_kernels.sizes import next_power_of_two

# Numbers of K that a program holds, and as many of V: 32 a thread.
_BLOCK = 4096


def append_kv(k_pages, v_pages, k, v, page_ids, offsets, layer, k_scales, v_scales, *, interpret: bool):
    """See `api.append_kv`."""
    tokens, kv_heads, head_dim = k.shape
    if tokens == 0:
        return pool_arrays(k_pages, v_pages, k_scales, v_scales)
    pool = pool_arrays(as_words(k_pages), as_words(v_pages), k_scales, v_scales)
    rows = encode(k, v, k_pages.dtype) if is_int4(k_pages.dtype) else (k, v)
    heads = min(next_power_of_two(kv_heads), max(1, _BLOCK // next_power_of_two(head_dim)))
    append = launch(
        partial(_append, heads=heads, rows=len(rows), dtype=k_pages.dtype),
        grid=(-(-kv_heads // heads), tokens),
        out_shape=tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in pool),
        name="append_kv",
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        cost=cost.append_kv(
            tokens=tokens, kv_heads=kv_heads, head_dim=head_dim, dtype=k.dtype, pool_dtype=k_pages.dtype
        ),
        aliases={3 + len(rows) + i: i for i in range(len(pool))},
    )
    written = append(as_layer(layer).reshape(1), page_ids, offsets, *rows, *pool)
    return tuple(from_words(array, k_pages.dtype) for array in written[:2]) + written[2:]


def _append(layer_ref, page_ref, offset_ref, *refs, heads: int, rows: int, dtype):
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
            # Triton has no rounding to an even half.
            values, scale = quantize(values, dtype, nearest=lambda x: jnp.floor(x + 0.5))
            has_scale = in_pool & (head < new.shape[1])
            plgpu.store(scales[i].at[layer, page, head, offset], scale, mask=has_scale)
            values, number = _pack(values), lax.iota(jnp.int32, dims // WORD)
            wanted = has_scale[:, None] & (number < pages.shape[4])[None, :]
        at = pages.at[layer, page, head[:, None], offset, number[None, :]]
        plgpu.store(at, values.astype(pages.dtype), mask=wanted)


def _pack(codes):
    """Rows of codes as rows of words, as `as_words` does it, with what Triton has."""
    heads, dims = codes.shape
    bytes_ = (codes.astype(jnp.int32) & 0xFF).reshape(heads, dims // WORD, WORD)
    return jnp.sum(bytes_ << (8 * lax.iota(jnp.int32, WORD)[None, None, :]), axis=-1, dtype=jnp.int32)
