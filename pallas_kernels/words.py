"""Views arrays of bytes as arrays of 32-bit words, for kernels that move memory."""

from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

WORD = 4  # bytes per word


def as_words(array: Array) -> Array:
    """One-byte elements, four per int32, the first in the lowest byte; other arrays unchanged.

    On a GPU it is a view of the same memory. Pallas counts offsets in elements but switches to 64-bit offsets
    by bytes, so offsets of one-byte elements may overflow where those of words do not.
    """
    if array.dtype.itemsize > 1:
        return array
    return lax.bitcast_convert_type(array.reshape(*array.shape[:-1], -1, WORD), jnp.int32)


def from_words(words: Array, dtype: DTypeLike) -> Array:
    """The inverse of `as_words`, for an array of this dtype."""
    if jnp.dtype(dtype).itemsize > 1:
        return words
    return lax.bitcast_convert_type(words, dtype).reshape(*words.shape[:-1], -1)


def each_pair(
    write: Callable[[str, Array, Array], Iterable[Array]], pool: Sequence[Array]
) -> tuple[Array, ...]:
    """Calls `write("pages", k, v)` and, if the pool has scales, `write("scales", ...)`; bytes as words."""
    words = [as_words(array) for array in pool]
    pairs = zip(("pages", "scales"), words[::2], words[1::2], strict=False)
    written = [part for pair in pairs for part in write(*pair)]
    return tuple(from_words(part, array.dtype) for part, array in zip(written, pool, strict=True))
