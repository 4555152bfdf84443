"""`move_pages` in Pallas Triton: one launch for K and V, all layers, in place.

Moves form chains (each page moves to the page that the next one leaves, the last to a free page) and cycles.
A program owns the same few elements of every page. It moves them along whole chains, beginning at the free
page, so that nothing is overwritten before it is moved; the first page of a cycle is held in registers.
Programs share no memory, so none waits for another.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from pallas_kernels import cost
from pallas_kernels.device import Device
from pallas_kernels.launch import launch
from pallas_kernels.move_pages.call import Call
from pallas_kernels.sizes import next_power_of_two
from pallas_kernels.words import each_pair

# Bytes of K, and of V, per program: 32 of each per thread.
_BLOCK_BYTES = 4096
# Programs among which the chains of one part of a page are divided.
_GROUPS = 32


def lacks(call: Call) -> str | None:
    """What the kernel lacks for these pages on this device, if anything."""
    return call.pool.storage.lacks(Device.current(), call.pool.shape[4], converts=False)


def run(call: Call, *, interpret: bool) -> tuple[Array, ...]:
    """See `api.move_pages`."""
    return each_pair(partial(_move_pair, chains(call.targets), interpret=interpret), call.pool.arrays)


def _move_pair(chains, name, *pair, interpret: bool):
    (layers, num_pages), dtype = pair[0].shape[:2], pair[0].dtype
    flat = [array.reshape(*array.shape[:2], -1) for array in pair]
    elements = max(array.shape[2] for array in flat)
    block = min(_BLOCK_BYTES // dtype.itemsize, next_power_of_two(elements))
    move = launch(
        partial(_move, block=block, barrier=not interpret),
        grid=(-(-elements // block), layers, min(_GROUPS, num_pages)),
        out_shape=tuple(jax.ShapeDtypeStruct(array.shape, dtype) for array in flat),
        name=f"move_{name}",
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        cost=cost.copy_pages(copies=num_pages, layers=layers, page_numbers=elements, dtype=dtype),
        aliases={3: 0, 4: 1},
    )
    moved = move(*chains, *flat)
    return tuple(pages.reshape(array.shape) for pages, array in zip(moved, pair, strict=True))


def chains(
    targets: Int[Array, " pages"],
) -> tuple[Int[Array, " 1"], Int[Array, " pages"], Int[Array, " pages"]]:
    """Where each chain begins, and the next page of each.

        page       0  1  2  3  4  5            3 -> 1 -> 0 ends in a free page, 2 <-> 4 is a cycle
        targets    6  0  4  1  2  5
        due        1  3  4  6  2  6            read backwards: 0 <- 1 <- 3, 2 <- 4 <- 2
        begin      0  2

    Args:
      targets: as for `api.move_pages`; `num_pages` for a page that is not needed.

    Returns:
      `(count, begin, due)`: the pages to begin at, `begin[:count]`, which are the free page of each chain and
      the lowest page of each cycle; and the page that moves to each page, `num_pages` for none.
    """
    num_pages = targets.shape[0]
    number = jnp.arange(num_pages, dtype=jnp.int32)
    moves = (targets < num_pages) & (targets != number)
    due = jnp.full(num_pages, num_pages, jnp.int32)
    due = due.at[jnp.where(moves, targets, num_pages)].set(number, mode="drop")

    def double(_, state):
        """Doubles the distance: the page reached after it, and the lowest page on the way."""
        reached, lowest = state
        return reached[reached], jnp.minimum(lowest, lowest[reached])

    start = jnp.where(moves, targets, number), number
    reached, lowest = lax.fori_loop(0, num_pages.bit_length(), double, start)
    # Only a cycle never reaches a page that does not move.
    begins = jnp.where(moves, moves[reached] & (lowest == number), due < num_pages)
    rank = jnp.cumsum(begins, dtype=jnp.int32)
    begin = jnp.zeros(num_pages, jnp.int32)
    begin = begin.at[jnp.where(begins, rank - 1, num_pages)].set(number, mode="drop")
    return rank[-1:], begin, due


def _move(count_ref, begin_ref, due_ref, _k, _v, k_pages, v_pages, *, block: int, barrier: bool):
    layer, group = pl.program_id(1), pl.program_id(2)
    groups, num_pages = pl.num_programs(2), k_pages.shape[1]
    number = pl.program_id(0) * block + lax.iota(jnp.int32, block)
    # There may be more scales of keys than of values.
    pool = [(pages, number < pages.shape[2]) for pages in (k_pages, v_pages)]

    def load(page):
        return [plgpu.load(pages.at[layer, page, number], mask=exists) for pages, exists in pool]

    def store(page, values):
        if barrier:
            # All threads must have read before any overwrites.
            plgpu.debug_barrier()
        for (pages, exists), value in zip(pool, values, strict=True):
            plgpu.store(pages.at[layer, page, number], value, mask=exists)

    def follow(chain, nothing):
        begin = begin_ref[group + chain * groups]
        first = load(begin)

        def move(target):
            page = due_ref[target]
            store(target, load(page))
            return page

        def continues(target):
            page = due_ref[target]
            return (page < num_pages) & (page != begin)

        last = lax.while_loop(continues, move, move(begin))

        @pl.when(due_ref[last] == begin)
        def _():
            store(last, first)

        return nothing

    lax.fori_loop(0, (count_ref[0] - group + groups - 1) // groups, follow, 0)
