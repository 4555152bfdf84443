"""Arrays of bytes as arrays of words, for kernels that move memory whatever it stands for."""

from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

# Bytes of a word of 32 bits.
WORD = 4


def as_words(array: Array) -> Array:
    """Elements of a byte, four to an int32, the first in the lowest byte; any other array as it is.

    For a GPU's compiler it is another name of the same memory. Pallas counts offsets in elements of an array
    and changes to 64 bits by its bytes: words are few enough where bytes would not be.
    """
    if array.dtype.itemsize > 1:
        return array
    return lax.bitcast_convert_type(array.reshape(*array.shape[:-1], -1, WORD), jnp.int32)


def from_words(words: Array, dtype: DTypeLike) -> Array:
    """What `as_words` was given, of this dtype."""
    if jnp.dtype(dtype).itemsize > 1:
        return words
    return lax.bitcast_convert_type(words, dtype).reshape(*words.shape[:-1], -1)


def each_pair(
    write: Callable[[str, Array, Array], Iterable[Array]], pool: Sequence[Array]
) -> tuple[Array, ...]:
    """`write("pages", k, v)` and, if a pool has them, `write("scales", ...)`; bytes go as words."""
    words = [as_words(array) for array in pool]
    pairs = zip(("pages", "scales"), words[::2], words[1::2], strict=False)
    written = [part for pair in pairs for part in write(*pair)]
    return tuple(from_words(part, array.dtype) for part, array in zip(written, pool, strict=True))
