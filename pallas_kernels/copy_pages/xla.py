"""`copy_pages` as a loop over the copies there are, so that none costs nothing."""

import jax
import jax.numpy as jnp


def copy_pages(k_pages, v_pages, sources, destinations):
    """See `api.copy_pages`."""
    num_pages, num_copies = k_pages.shape[1], sources.shape[0]
    wanted = destinations < num_pages
    rank = jnp.cumsum(wanted, dtype=jnp.int32)
    place = jnp.where(wanted, rank - 1, num_copies)
    sources = jnp.zeros_like(sources).at[place].set(sources, mode="drop")
    destinations = jnp.zeros_like(destinations).at[place].set(destinations, mode="drop")

    def copy(i, pools):
        def one(pages):
            page = jax.lax.dynamic_slice_in_dim(pages, sources[i], 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(pages, page, destinations[i], axis=1)

        return tuple(one(pages) for pages in pools)

    return jax.lax.fori_loop(0, rank[-1], copy, (k_pages, v_pages))
