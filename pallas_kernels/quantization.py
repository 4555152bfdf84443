"""Quantized K and V: codes of one byte, and one float32 scale for each token and KV head.

The dtype of the pool says what the codes are: int8 is integers, uint8 the bits of float8 E4M3FN. (An array
of XLA's own float8 dtype would be converted whole, and copied, by each write on a CPU.)
"""

from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Codes of a word of 32 bits.
WORD = 4
_LARGEST_INT8, _LARGEST_E4M3FN = 127.0, 448.0
# Scales tried for E4M3FN, as multiples of the one that makes the largest number the largest code.
_FACTORS = (1.0, 2**0.25, 2**0.5, 2**0.75)
# Rows below this are stored as zeros: the inverse of their scale would overflow.
_LEAST = 1e-30


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether numbers of this dtype are codes that need a scale."""
    return jnp.dtype(dtype) in (jnp.int8, jnp.uint8)


def token_bytes(kv_heads: int, head_dim: int, dtype: DTypeLike) -> int:
    """K and V of a token in one layer, and the float32 scales of codes.

    Example:
      >>> token_bytes(8, 128, "bfloat16"), token_bytes(8, 128, "int8")
      (4096, 2112)
    """
    scale = 4 if is_quantized(dtype) else 0
    return 2 * kv_heads * (head_dim * jnp.dtype(dtype).itemsize + scale)


def quantize(
    values: Float[Array, "*rows head_dim"],
    dtype: DTypeLike,
    nearest: Callable[[Array], Array] = jnp.round,
) -> tuple[Array, Float[Array, "*rows"]]:
    """Codes and scales: each row's largest magnitude becomes the largest code, or nearly so.

    E4M3FN is finer just above a power of two than just below: of scales up to an octave apart a row takes
    the one with the least squared error.

    A NaN becomes zero and an infinity the row's largest finite number, so that one bad number does not
    spoil its row, and what is stored is always finite. A row of zeros comes back exactly.

    Args:
      values: any floating dtype.
      dtype: int8, uint8 (the bits of E4M3FN) or float8_e4m3fn itself.
      nearest: rounds to an integer, for int8.

    Returns:
      `(codes, scales)`, scales float32.
    """
    # Beyond it a scale up to an octave larger might stand for more than the dtype can hold.
    end = 0.9 * float(jnp.finfo(values.dtype).max)
    values, integers = values.astype(jnp.float32), jnp.dtype(dtype) == jnp.int8
    largest = _LARGEST_INT8 if integers else _LARGEST_E4M3FN
    magnitude = jnp.abs(values)
    finite = magnitude <= float(jnp.finfo(jnp.float32).max)
    most = jnp.max(jnp.where(finite, magnitude, 0.0), axis=-1, keepdims=True)
    most = jnp.where(most > _LEAST, most, 0.0)
    inverse = jnp.where(most > 0, largest / jnp.where(most > 0, most, 1.0), 0.0)
    values = jnp.where(values == values, jnp.minimum(jnp.maximum(values, -most), most), 0.0)
    if integers:
        return nearest(values * inverse).astype(dtype), (most * (1 / largest))[..., 0]
    factor, least = jnp.ones_like(most), None
    for step in _FACTORS:
        scaled = values * (inverse * (1 / step))
        error = scaled - as_float32(_as_e4m3fn(scaled, dtype))
        # In whole numbers: their sum does not depend on its order, and backends agree but for near ties.
        squares = (error * error * (1024 * step * step)).astype(jnp.int32)
        total = jnp.sum(squares, axis=-1, keepdims=True, dtype=jnp.int32)
        factor = factor if least is None else jnp.where(total < least, step, factor)
        least = total if least is None else jnp.minimum(total, least)
    factor = jnp.where(most < end, factor, 1.0)
    codes = _as_e4m3fn(values * (inverse * (1 / factor)), dtype)
    return codes, (most * (1 / largest) * factor)[..., 0]


def as_float32(codes: Array) -> Float[Array, "..."]:
    """Codes as numbers; any other array as float32 too.

    The bits of E4M3FN are read as float16 with the exponent moved into place, which is 2**-8 of their value:
    ten times as fast on a CPU as XLA's own conversion.
    """
    if codes.dtype != jnp.uint8:
        return codes.astype(jnp.float32)
    bits = codes.astype(jnp.uint16)
    bits = (bits & 0x80) << 8 | (bits & 0x7F) << 7
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 256


def _as_e4m3fn(values: Array, dtype: DTypeLike) -> Array:
    codes = values.astype(jnp.float8_e4m3fn)
    return codes if jnp.dtype(dtype) == codes.dtype else lax.bitcast_convert_type(codes, dtype)


def dequantize(
    codes: Array, scales: Float[Array, "*rows"], dtype: DTypeLike
) -> Float[Array, "*rows head_dim"]:
    """The numbers that codes stand for."""
    return (as_float32(codes) * scales[..., None]).astype(dtype)


def as_float8(array: Array) -> Array:
    """Bits as the dtype that a GPU's kernel converts; any other array as it is."""
    return lax.bitcast_convert_type(array, jnp.float8_e4m3fn) if array.dtype == jnp.uint8 else array


def as_words(codes: Array) -> Array:
    """Codes, four to an int32, the first in the lowest byte; any other array as it is.

    For a GPU's compiler it is another name of the same memory. Pallas counts offsets in numbers of an array
    and changes to 64 bits by its bytes: words are few enough where codes would not be.
    """
    if codes.dtype.itemsize > 1:
        return codes
    return lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], -1, WORD), jnp.int32)


def from_words(words: Array, dtype: DTypeLike) -> Array:
    """What `as_words` was given, of this dtype."""
    if jnp.dtype(dtype).itemsize > 1:
        return words
    return lax.bitcast_convert_type(words, dtype).reshape(*words.shape[:-1], -1)


def each_pair(write: Callable[[Array, Array], Iterable[Array]], pool: Sequence[Array]) -> tuple[Array, ...]:
    """`write(k, v)` of a pool's pages and, if it has them, of its scales; codes go as words."""
    words = [as_words(array) for array in pool]
    written = [part for pair in zip(words[::2], words[1::2], strict=True) for part in write(*pair)]
    return tuple(from_words(part, array.dtype) for part, array in zip(written, pool, strict=True))
