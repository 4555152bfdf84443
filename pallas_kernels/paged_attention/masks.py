"""The attention mask, the same for every backend."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Larger than any index.
_NEAR = 2**31 - 1


def sees(
    row_indices: Int[Array, "..."], key_indices: Int[Array, "..."], *, window: int | None, sink_tokens: int
) -> Bool[Array, "..."]:
    """Whether a query attends to a key: up to its own index, within the window or the first `sink_tokens`.

    Args:
      row_indices: of the queries in their sequence, along one axis.
      key_indices: of the keys, along the other.
      window, sink_tokens: as in `paged_attention`.
    """
    visible = key_indices <= row_indices
    if window is None:
        return visible
    if sink_tokens:
        # Sink tokens count as near, so that one comparison per query and key suffices.
        key_indices = jnp.where(key_indices < sink_tokens, _NEAR, key_indices)
    return visible & (key_indices > row_indices - window)
