"""`move_pages` by gathers and scatters: a chunk of pages is lifted out of the pool at a time."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import control_flow
from pallas_kernels.move_pages.call import Call

# Bytes of K and V that are lifted out of the pool at a time, at most (one page, if that is more).
_CHUNK_BYTES = 16 * 2**20


def lacks(call: Call) -> str | None:
    """Nothing."""


def run(call: Call, *, interpret: bool) -> tuple[Array, ...]:
    """See `api.move_pages`. The lowest places are filled first.

    A place may hold a page that has not moved yet. It trades places: the pages displaced by a chunk
    go to the places the chunk's pages leave, and are carried on from there when their turn comes.
    """
    del interpret
    pool, targets = call.pool.arrays, call.targets
    num_pages = targets.shape[0]
    page_bytes = sum(pages.size * pages.dtype.itemsize for pages in pool) // num_pages
    # A chunk is lifted together with the pages it displaces.
    chunk = min(num_pages, max(1, _CHUNK_BYTES // (2 * page_bytes)))
    number = jnp.arange(num_pages, dtype=jnp.int32)
    moves = (targets < num_pages) & (targets != number)
    # The page that is due at each place, for the places whose page must move, lowest first.
    due = jnp.full(num_pages, num_pages, jnp.int32)
    due = due.at[jnp.where(moves, targets, num_pages)].set(number, mode="drop")
    ends = jnp.cumsum(due < num_pages, dtype=jnp.int32)
    queue = jnp.full(num_pages, num_pages, jnp.int32)
    queue = queue.at[jnp.where(due < num_pages, ends - 1, num_pages)].set(number, mode="drop")

    def step(i, state):
        # `place[page]` says where the page that began as `page` lies now, `holder` the reverse.
        pool, place, holder = state
        to = _get(queue, i * chunk + jnp.arange(chunk, dtype=jnp.int32), num_pages)
        page = _get(due, to, num_pages)
        source = _get(place, page, num_pages)
        # `to` is sorted. Displaced: a place whose content is not itself one of the chunk's pages.
        at = jnp.minimum(jnp.searchsorted(to, source, method="scan_unrolled").astype(jnp.int32), chunk - 1)
        inside = (to[at] == source) & (source < num_pages)
        stays = jnp.zeros(chunk, bool).at[jnp.where(inside, at, chunk)].set(True, mode="drop")
        displaced = _get(holder, jnp.where(stays, num_pages, to), num_pages)
        vacated = (source < num_pages) & ~inside
        # The n-th displaced page goes to the n-th vacated place.
        leaves = (to < num_pages) & ~stays
        nth = jnp.where(vacated, jnp.cumsum(vacated, dtype=jnp.int32) - 1, chunk)
        place_of = jnp.full(chunk, num_pages, jnp.int32).at[nth].set(source, mode="drop")
        refuge = _get(place_of, jnp.cumsum(leaves, dtype=jnp.int32) - 1, num_pages)
        refuge = jnp.where(leaves & (displaced < num_pages), refuge, num_pages)

        read = jnp.concatenate([source, to])
        write = jnp.concatenate([to, refuge])
        pool = tuple(_permute(pages, read, write) for pages in pool)
        place = place.at[page].set(to, mode="drop").at[displaced].set(refuge, mode="drop")
        holder = holder.at[jnp.where(vacated, source, num_pages)].set(num_pages, mode="drop")
        holder = holder.at[to].set(page, mode="drop").at[refuge].set(displaced, mode="drop")
        return pool, place, holder

    holder = jnp.where(targets < num_pages, number, num_pages)
    chunks = (ends[-1] + chunk - 1) // chunk
    return control_flow.fori_loop(0, chunks, step, (pool, number, holder))[0]


def _get(values: Array, index: Int[Array, " moves"], fill: int) -> Array:
    return values.at[index].get(mode="fill", fill_value=fill)


def _permute(pages: Array, read: Int[Array, " moves"], write: Int[Array, " moves"]) -> Array:
    """`pages[:, write] = pages[:, read]`, all reads before all writes; a write past the end is dropped."""
    return pages.at[:, write].set(pages.at[:, read].get(mode="clip"), mode="drop")
