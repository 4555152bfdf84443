"""`copy_pages` in Pallas Triton: one launch for K and V, all layers, in place."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import cost
from pallas_kernels.copy_pages.call import Call
from pallas_kernels.device import Device
from pallas_kernels.launch import launch
from pallas_kernels.sizes import next_power_of_two
from pallas_kernels.words import each_pair

# Bytes per program and step: 64 per thread.
_BLOCK_BYTES = 8192


def lacks(call: Call) -> str | None:
    """What the kernel lacks for these pages on this device, if anything."""
    return call.pool.storage.lacks(Device.current(), call.pool.shape[4], converts=False)


def run(call: Call, *, interpret: bool) -> tuple[Array, ...]:
    """See `api.copy_pages`."""
    if call.sources.shape[0] == 0:
        return call.pool.arrays
    copy_pair = partial(_copy_pair, call.sources, call.destinations, interpret=interpret)
    return each_pair(copy_pair, call.pool.arrays)


def _copy_pair(sources, destinations, name, *pair, interpret: bool):
    layers, dtype = pair[0].shape[0], pair[0].dtype
    flat = [array.reshape(*array.shape[:2], -1) for array in pair]
    elements = max(array.shape[2] for array in flat)
    copy = launch(
        partial(_copy, block=min(_BLOCK_BYTES // dtype.itemsize, next_power_of_two(elements))),
        # Programs of a copy that is out of range end at once.
        grid=(layers, sources.shape[0]),
        out_shape=tuple(jax.ShapeDtypeStruct(array.shape, dtype) for array in flat),
        name=f"copy_{name}",
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        cost=cost.copy_pages(copies=sources.shape[0], layers=layers, page_numbers=elements, dtype=dtype),
        aliases={2: 0, 3: 1},
    )
    copied = copy(sources, destinations, *flat)
    return tuple(pages.reshape(array.shape) for pages, array in zip(copied, pair, strict=True))


def _copy(source_ref, destination_ref, _k, _v, k_pages, v_pages, *, block: int):
    layer, copy = pl.program_id(0), pl.program_id(1)
    source, destination = source_ref[copy], destination_ref[copy]
    elements = max(k_pages.shape[2], v_pages.shape[2])
    last = k_pages.shape[1] - 1

    @pl.when((source >= 0) & (source <= last) & (destination >= 0) & (destination <= last))
    def _():
        def step(i, _):
            index = i * block + lax.iota(jnp.int32, block)
            for pages in (k_pages, v_pages):
                # There may be more scales of keys than of values.
                exists = index < pages.shape[2]
                values = plgpu.load(pages.at[layer, source, index], mask=exists)
                plgpu.store(pages.at[layer, destination, index], values, mask=exists)
            return 0

        lax.fori_loop(0, -(-elements // block), step, 0)
