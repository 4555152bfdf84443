"""Weights from scores and their log-sum-exp, the same for every backend."""

import jax.numpy as jnp
from jaxtyping import Array, Float

# Above this magnitude the rounding error of a log-sum-exp and of its scores exceeds 1; it is relative.
_FAR, _ROUNDING = 2.0**24, 2.0**-21


def log_weights(
    scores: Float[Array, "*rows tokens"], log_sum: Float[Array, "*#rows 1"]
) -> Float[Array, "*rows tokens"]:
    """The natural logarithm of each score's weight, at most zero.

    Scores within the rounding error of a very large maximum count as the maximum. With a log-sum-exp of -inf,
    of a row that attends to no key, every weight is zero.
    """
    slack = jnp.where(jnp.abs(log_sum) > _FAR, jnp.abs(log_sum) * _ROUNDING, 0.0)
    below = jnp.minimum(scores + (slack - log_sum), 0.0)
    return jnp.where(log_sum == -jnp.inf, -jnp.inf, below)
