"""`copy_pages` in Pallas Triton: one launch for K and V, all layers, within the pool's own memory."""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import cost
from pallas_kernels.launch import launch
from pallas_kernels.quantization import each_pair
from pallas_kernels.sizes import next_power_of_two

# Bytes that a program holds at a time: 64 a thread.
_BLOCK_BYTES = 8192


def copy_pages(pool, sources, destinations, *, interpret: bool):
    """See `api.copy_pages`."""
    if sources.shape[0] == 0:
        return pool
    return each_pair(partial(_copy_pair, sources, destinations, interpret=interpret), pool)


def _copy_pair(sources, destinations, k_pages, v_pages, *, interpret: bool):
    layers, num_pages = k_pages.shape[:2]
    numbers = prod(k_pages.shape[2:])
    flat = layers, num_pages, numbers
    pool = jax.ShapeDtypeStruct(flat, k_pages.dtype)
    copy = launch(
        partial(_copy, block=min(_BLOCK_BYTES // k_pages.dtype.itemsize, next_power_of_two(numbers))),
        # A copy that is not wanted ends its programs at once.
        grid=(layers, sources.shape[0]),
        out_shape=(pool, pool),
        name="copy_pages" if k_pages.ndim == 5 else "copy_scales",
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        cost=cost.copy_pages(
            copies=sources.shape[0], layers=layers, page_numbers=numbers, dtype=k_pages.dtype
        ),
        aliases={2: 0, 3: 1},
    )
    copied = copy(sources, destinations, k_pages.reshape(flat), v_pages.reshape(flat))
    return tuple(pages.reshape(k_pages.shape) for pages in copied)


def _copy(source_ref, destination_ref, _k, _v, k_pages, v_pages, *, block: int):
    layer, copy = pl.program_id(0), pl.program_id(1)
    source, destination = source_ref[copy], destination_ref[copy]
    numbers = k_pages.shape[2]

    last = k_pages.shape[1] - 1

    @pl.when((source >= 0) & (source <= last) & (destination >= 0) & (destination <= last))
    def _():
        def step(i, _):
            number = i * block + lax.iota(jnp.int32, block)
            exists = number < numbers
            for pages in (k_pages, v_pages):
                values = plgpu.load(pages.at[layer, source, number], mask=exists)
                plgpu.store(pages.at[layer, destination, number], values, mask=exists)
            return 0

        lax.fori_loop(0, -(-numbers // block), step, 0)
