"""An order of reads and writes that a compiler must keep."""

import jax.numpy as jnp
from jaxtyping import Array


def after(array: Array, *others: Array) -> Array:
    """The array as it is, but not before the others are there.

    What reads a buffer may be put after what writes to it, and then the whole buffer is copied first. XLA
    takes `optimization_barrier` out before it decides that, but a dependency on data it keeps: a number of
    each of the others is asked whether it is below zero and above, which XLA does not see through.

    Args:
      array: what a later write depends on.
      others: results of the reads; none of them empty.

    Example:
      >>> import jax.numpy as jnp
      >>> after(jnp.arange(3), jnp.ones(2)).tolist()
      [0, 1, 2]
    """
    corners = [other.reshape(-1)[0] for other in others]
    never = jnp.any(jnp.stack([(corner < 0) & (corner > 0) for corner in corners]))
    return jnp.where(never, jnp.zeros((), array.dtype), array)
