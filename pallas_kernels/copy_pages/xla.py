"""`copy_pages` as a loop over the actual copies, so that skipped ones cost nothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import control_flow
from pallas_kernels.copy_pages.call import Call


def lacks(call: Call) -> str | None:
    """None: XLA supports every call."""


def run(call: Call, *, interpret: bool) -> tuple[Array, ...]:
    """See `api.copy_pages`."""
    del interpret
    pool, sources, destinations = call.pool.arrays, call.sources, call.destinations
    num_copies = sources.shape[0]
    number = jnp.arange(num_copies, dtype=jnp.int32)
    last = pool[0].shape[1] - 1
    wanted = (sources >= 0) & (sources <= last) & (destinations >= 0) & (destinations <= last)

    def next_after(i):
        return jnp.min(jnp.where(wanted & (number > i), number, num_copies))

    def copy(state):
        i, pool = state

        def one(pages):
            page = jax.lax.dynamic_slice_in_dim(pages, sources[i], 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(pages, page, destinations[i], axis=1)

        return next_after(i), tuple(one(pages) for pages in pool)

    _, pool = control_flow.while_loop(lambda state: state[0] < num_copies, copy, (next_after(-1), pool))
    return pool
