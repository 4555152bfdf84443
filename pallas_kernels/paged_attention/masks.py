"""Which places a token sees: the same for every backend."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Beyond any row's place.
_NEAR = 2**31 - 1


def sees(
    row_places: Int[Array, "..."], places: Int[Array, "..."], *, window: int | None, sink_tokens: int
) -> Bool[Array, "..."]:
    """Those up to its own; with a window, of these the last and the sequence's first `sink_tokens`.

    Args:
      row_places: of the tokens that look, along one axis.
      places: of those that may be seen, along the other.
      window, sink_tokens: as in `paged_attention`.
    """
    visible = places <= row_places
    if window is None:
        return visible
    if sink_tokens:
        # As if they were near, which takes one comparison for each row and place.
        places = jnp.where(places < sink_tokens, _NEAR, places)
    return visible & (places > row_places - window)
