"""What every backend makes of scores and their log-sum-exp."""

import jax.numpy as jnp
from jaxtyping import Array, Float

# From here on the rounding of a log-sum-exp and of its scores, each a part of it, is more than one.
_FAR, _ROUNDING = 2.0**24, 2.0**-21


def log_weights(
    scores: Float[Array, "*rows tokens"], log_sum: Float[Array, "*#rows 1"]
) -> Float[Array, "*rows tokens"]:
    """The natural logarithm of each score's weight; none is above zero.

    Of huge scores whatever lies within their rounding counts as the greatest. A log-sum-exp of -inf, of a row
    that sees nothing, gives every score the weight zero.
    """
    slack = jnp.where(jnp.abs(log_sum) > _FAR, jnp.abs(log_sum) * _ROUNDING, 0.0)
    below = jnp.minimum(scores + (slack - log_sum), 0.0)
    return jnp.where(log_sum == -jnp.inf, -jnp.inf, below)
