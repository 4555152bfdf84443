"""Orders reads before writes in a way that the compiler must keep."""

import jax.numpy as jnp
from jaxtyping import Array


def after(array: Array, *others: Array) -> Array:
    """Returns the array unchanged, but only after the others are computed.

    A compiler may schedule a read of a buffer after a write to it; it then copies the whole buffer first. XLA
    removes `optimization_barrier` before scheduling, but keeps data dependencies. Here the result depends on
    whether an element of each of the others is both below and above zero, which XLA does not simplify.

    Args:
      array: an input of the later write.
      others: results of the reads; none of them empty.

    Example:
      >>> import jax.numpy as jnp
      >>> after(jnp.arange(3), jnp.ones(2)).tolist()
      [0, 1, 2]
    """
    elements = [other.reshape(-1)[0] for other in others]
    never = jnp.any(jnp.stack([(element < 0) & (element > 0) for element in elements]))
    return jnp.where(never, jnp.zeros((), array.dtype), array)
