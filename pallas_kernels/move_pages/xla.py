"""`move_pages` by gathers and scatters of one chunk of pages at a time."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import control_flow
from pallas_kernels.move_pages.call import Call

# Most bytes of K and V that are gathered at a time (or one page, if that is more).
_CHUNK_BYTES = 16 * 2**20


def lacks(call: Call) -> str | None:
    """None: XLA supports every call."""


def run(call: Call, *, interpret: bool) -> tuple[Array, ...]:
    """See `api.move_pages`. The lowest targets are written first.

    A target may hold content that has not moved yet. It is exchanged: content displaced by a chunk moves to
    the pages that the chunk's content leaves, and from there to its target in a later chunk.
    """
    del interpret
    pool, targets = call.pool.arrays, call.targets
    num_pages = targets.shape[0]
    page_bytes = sum(pages.size * pages.dtype.itemsize for pages in pool) // num_pages
    # A chunk is gathered together with the pages that it displaces.
    chunk = min(num_pages, max(1, _CHUNK_BYTES // (2 * page_bytes)))
    number = jnp.arange(num_pages, dtype=jnp.int32)
    moves = (targets < num_pages) & (targets != number)
    # The page whose content is due at each target; and the targets, lowest first.
    due = jnp.full(num_pages, num_pages, jnp.int32)
    due = due.at[jnp.where(moves, targets, num_pages)].set(number, mode="drop")
    ends = jnp.cumsum(due < num_pages, dtype=jnp.int32)
    queue = jnp.full(num_pages, num_pages, jnp.int32)
    queue = queue.at[jnp.where(due < num_pages, ends - 1, num_pages)].set(number, mode="drop")

    def step(i, state):
        # `location[page]` is where the content of `page` is now, `content` the inverse.
        pool, location, content = state
        to = _get(queue, i * chunk + jnp.arange(chunk, dtype=jnp.int32), num_pages)
        page = _get(due, to, num_pages)
        source = _get(location, page, num_pages)
        # `to` is sorted. Displaced is the content of a target that is not itself a source of the chunk.
        at = jnp.minimum(jnp.searchsorted(to, source, method="scan_unrolled").astype(jnp.int32), chunk - 1)
        inside = (to[at] == source) & (source < num_pages)
        stays = jnp.zeros(chunk, bool).at[jnp.where(inside, at, chunk)].set(True, mode="drop")
        displaced = _get(content, jnp.where(stays, num_pages, to), num_pages)
        vacated = (source < num_pages) & ~inside
        # The n-th displaced content moves to the n-th vacated page.
        leaves = (to < num_pages) & ~stays
        nth = jnp.where(vacated, jnp.cumsum(vacated, dtype=jnp.int32) - 1, chunk)
        vacated_pages = jnp.full(chunk, num_pages, jnp.int32).at[nth].set(source, mode="drop")
        moved_to = _get(vacated_pages, jnp.cumsum(leaves, dtype=jnp.int32) - 1, num_pages)
        moved_to = jnp.where(leaves & (displaced < num_pages), moved_to, num_pages)

        read = jnp.concatenate([source, to])
        write = jnp.concatenate([to, moved_to])
        pool = tuple(_permute(pages, read, write) for pages in pool)
        location = location.at[page].set(to, mode="drop").at[displaced].set(moved_to, mode="drop")
        content = content.at[jnp.where(vacated, source, num_pages)].set(num_pages, mode="drop")
        content = content.at[to].set(page, mode="drop").at[moved_to].set(displaced, mode="drop")
        return pool, location, content

    content = jnp.where(targets < num_pages, number, num_pages)
    chunks = (ends[-1] + chunk - 1) // chunk
    return control_flow.fori_loop(0, chunks, step, (pool, number, content))[0]


def _get(values: Array, index: Int[Array, " moves"], fill: int) -> Array:
    return values.at[index].get(mode="fill", fill_value=fill)


def _permute(pages: Array, read: Int[Array, " moves"], write: Int[Array, " moves"]) -> Array:
    """`pages[:, write] = pages[:, read]`, all reads before all writes; a write past the end is dropped."""
    return pages.at[:, write].set(pages.at[:, read].get(mode="clip"), mode="drop")
