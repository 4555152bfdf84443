"""`move_pages` in Pallas Triton: one launch for K and V, all layers, within the pool's own memory.

Moves form chains (each page goes where the one before it has left, the last into a hole) and cycles.
A program has the same few numbers of every page to itself and carries them along whole chains, from
the hole backwards, so that nothing is overwritten before it has moved on; the first page of a cycle
waits in registers. No two programs ever meet, and none waits for another.
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

# Bytes of K that a program carries, and as many of V: 32 of each a thread.
_BLOCK_BYTES = 4096
# Programs that share the chains of one part of a page.
_GROUPS = 32


def lacks(call: Call) -> str | None:
    """What the kernel lacks for these pages on this device, if anything."""
    return call.pool.storage.lacks(Device.current(), call.pool.shape[4], converts=False)


def run(call: Call, *, interpret: bool) -> tuple[Array, ...]:
    """See `api.move_pages`."""
    return each_pair(partial(_move_pair, chains(call.targets), interpret=interpret), call.pool.arrays)


def _move_pair(way, name, *pair, interpret: bool):
    (layers, num_pages), dtype = pair[0].shape[:2], pair[0].dtype
    flat = [array.reshape(*array.shape[:2], -1) for array in pair]
    numbers = max(array.shape[2] for array in flat)
    block = min(_BLOCK_BYTES // dtype.itemsize, next_power_of_two(numbers))
    move = launch(
        partial(_move, block=block, barrier=not interpret),
        grid=(-(-numbers // block), layers, min(_GROUPS, num_pages)),
        out_shape=tuple(jax.ShapeDtypeStruct(array.shape, dtype) for array in flat),
        name=f"move_{name}",
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        cost=cost.copy_pages(copies=num_pages, layers=layers, page_numbers=numbers, dtype=dtype),
        aliases={3: 0, 4: 1},
    )
    moved = move(*way, *flat)
    return tuple(pages.reshape(array.shape) for pages, array in zip(moved, pair, strict=True))


def chains(
    targets: Int[Array, " pages"],
) -> tuple[Int[Array, " 1"], Int[Array, " pages"], Int[Array, " pages"]]:
    """Where to begin, and how to go on.

        page       0  1  2  3  4  5            3 -> 1 -> 0 ends in a hole, 2 <-> 4 is a cycle
        targets    6  0  4  1  2  5
        due        1  3  4  6  2  6            read backwards: 0 <- 1 <- 3, 2 <- 4 <- 2
        begin      0  2

    Args:
      targets: as `api.move_pages` takes them; `num_pages` for a page that nobody needs.

    Returns:
      `(count, begin, due)`: places to begin at, `begin[:count]`, the hole of each chain and the lowest
      place of each cycle; and the page due at each place, `num_pages` for none.
    """
    num_pages = targets.shape[0]
    number = jnp.arange(num_pages, dtype=jnp.int32)
    moves = (targets < num_pages) & (targets != number)
    due = jnp.full(num_pages, num_pages, jnp.int32)
    due = due.at[jnp.where(moves, targets, num_pages)].set(number, mode="drop")

    def double(_, state):
        """Twice as far along the way: where it leads, and the lowest place passed."""
        reached, lowest = state
        return reached[reached], jnp.minimum(lowest, lowest[reached])

    start = jnp.where(moves, targets, number), number
    reached, lowest = lax.fori_loop(0, num_pages.bit_length(), double, start)
    # Only a cycle never leads to a place whose page stays.
    begins = jnp.where(moves, moves[reached] & (lowest == number), due < num_pages)
    rank = jnp.cumsum(begins, dtype=jnp.int32)
    begin = jnp.zeros(num_pages, jnp.int32)
    begin = begin.at[jnp.where(begins, rank - 1, num_pages)].set(number, mode="drop")
    return rank[-1:], begin, due


def _move(count_ref, begin_ref, due_ref, _k, _v, k_pages, v_pages, *, block: int, barrier: bool):
    layer, group = pl.program_id(1), pl.program_id(2)
    groups, num_pages = pl.num_programs(2), k_pages.shape[1]
    number = pl.program_id(0) * block + lax.iota(jnp.int32, block)
    # Scales of keys may be more than those of values.
    pool = [(pages, number < pages.shape[2]) for pages in (k_pages, v_pages)]

    def load(page):
        return [plgpu.load(pages.at[layer, page, number], mask=exists) for pages, exists in pool]

    def store(page, values):
        if barrier:
            # Every thread has read what is about to be overwritten.
            plgpu.debug_barrier()
        for (pages, exists), value in zip(pool, values, strict=True):
            plgpu.store(pages.at[layer, page, number], value, mask=exists)

    def follow(chain, nothing):
        begin = begin_ref[group + chain * groups]
        first = load(begin)

        def carry(place):
            page = due_ref[place]
            store(place, load(page))
            return page

        def goes_on(place):
            page = due_ref[place]
            return (page < num_pages) & (page != begin)

        last = lax.while_loop(goes_on, carry, carry(begin))

        @pl.when(due_ref[last] == begin)
        def _():
            store(last, first)

        return nothing

    lax.fori_loop(0, (count_ref[0] - group + groups - 1) // groups, follow, 0)
