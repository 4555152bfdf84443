"""Quantized K and V: codes of one byte, and one float32 scale for each token and KV head; or of four bits.

The dtype of the pool says what the codes are: int8 is integers, uint8 the bits of float8 E4M3FN, int32 words
of eight codes (see `int4`). (An array of XLA's own float8 dtype would be converted whole, and copied, by each
write on a CPU.) uint16 is not quantized: it is the bits of bfloat16, for the same reason.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import int4

# Codes of a word of 32 bits.
WORD = 4
_LARGEST_INT8, _LARGEST_E4M3FN = 127.0, 448.0
# Scales tried for E4M3FN, as multiples of the one that makes the largest number the largest code.
_FACTORS = (1.0, 2**0.25, 2**0.5, 2**0.75)
# Rows below this are stored as zeros: the inverse of their scale would overflow.
_LEAST = 1e-30


def stored_dtype(dtype: str) -> str:
    """The dtype of a pool of K and V that are not quantized.

    Before JAX 0.11 XLA converts a whole bfloat16 pool to float32 and back for each write on a CPU, so there
    the pool holds its bits as uint16.
    """
    return "uint16" if dtype == "bfloat16" and jax.__version_info__ < (0, 11) else dtype


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether numbers of this dtype are codes that need a scale."""
    return jnp.dtype(dtype) in (jnp.int8, jnp.uint8) or is_int4(dtype)


def is_int4(dtype: DTypeLike) -> bool:
    """Whether numbers of this dtype are words of four-bit codes."""
    return jnp.dtype(dtype) == jnp.int32


def row_size(head_dim: int, dtype: DTypeLike) -> int:
    """Numbers of a pool that hold a head of one token: codes of a word count as one."""
    return head_dim // int4.CODES if is_int4(dtype) else head_dim


def head_dim_of(pages: Array | jax.ShapeDtypeStruct) -> int:
    """The reverse."""
    return pages.shape[-1] * (int4.CODES if is_int4(pages.dtype) else 1)


def scale_shapes(shape: Sequence[int], dtype: DTypeLike) -> tuple[tuple[int, ...], ...]:
    """Shapes of the scales of K and of V, for pages of this shape; none for numbers that are no codes."""
    if not is_quantized(dtype):
        return ()
    if not is_int4(dtype):
        return (tuple(shape[:-1]),) * 2
    head_dim = shape[-1] * int4.CODES
    return tuple((*shape[:-1], int4.num_scale_words(head_dim, keys=keys)) for keys in (True, False))


def scale_dtype(dtype: DTypeLike) -> str:
    """Of the scales of such codes."""
    return "int32" if is_int4(dtype) else "float32"


def token_bytes(kv_heads: int, head_dim: int, dtype: DTypeLike) -> int:
    """K and V of a token in one layer, and the scales of codes.

    Example:
      >>> token_bytes(8, 128, "bfloat16"), token_bytes(8, 128, "int8"), token_bytes(8, 128, "int32")
      (4096, 2112, 1216)
    """
    row = kv_heads, row_size(head_dim, dtype)
    scales = sum(4 * prod(shape) for shape in scale_shapes(row, dtype))
    return 2 * prod(row) * jnp.dtype(dtype).itemsize + scales


def encode(
    k: Float[Array, "*rows head_dim"], v: Float[Array, "*rows head_dim"], dtype: DTypeLike
) -> tuple[Array, ...]:
    """Rows of K and V as a pool of this dtype keeps them: what lies in each of its arrays."""
    if not is_quantized(dtype):
        return as_stored(k, dtype), as_stored(v, dtype)
    if is_int4(dtype):
        (k, k_scales), (v, v_scales) = int4.quantize(k, keys=True), int4.quantize(v, keys=False)
    else:
        (k, k_scales), (v, v_scales) = quantize(k, dtype), quantize(v, dtype)
    return k, v, k_scales, v_scales


def decode(rows: Sequence[Array], dtype: DTypeLike) -> tuple[Array, Array]:
    """K and V `[*rows, head_dim]` of rows as a pool keeps them.

    Args:
      rows: as from `encode`, or pages of a pool.
      dtype: of the result.
    """
    k, v, *scales = rows
    if not scales:
        return as_floats(k).astype(dtype), as_floats(v).astype(dtype)
    k, v = (dequantize(codes, scale, dtype) for codes, scale in zip((k, v), scales, strict=True))
    return k, v


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
        return as_floats(codes).astype(jnp.float32)
    bits = codes.astype(jnp.uint16)
    bits = (bits & 0x80) << 8 | (bits & 0x7F) << 7
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 256


def as_floats(array: Array) -> Array:
    """The bits of bfloat16 as what they stand for; any other array as it is.

    For a GPU's compiler it is another name of the same memory. On a CPU it is a copy: take a part first.
    """
    return lax.bitcast_convert_type(array, jnp.bfloat16) if array.dtype == jnp.uint16 else array


def as_stored(values: Float[Array, "..."], dtype: DTypeLike) -> Array:
    """Values as a pool of this dtype keeps them, where it is not quantized."""
    if jnp.dtype(dtype) != jnp.uint16:
        return values.astype(dtype)
    return lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)


def _as_e4m3fn(values: Array, dtype: DTypeLike) -> Array:
    codes = values.astype(jnp.float8_e4m3fn)
    return codes if jnp.dtype(dtype) == codes.dtype else lax.bitcast_convert_type(codes, dtype)


def dequantize(codes: Array, scales: Array, dtype: DTypeLike) -> Float[Array, "*rows head_dim"]:
    """The numbers that codes stand for."""
    if not is_int4(codes.dtype):
        return (as_float32(codes) * scales[..., None]).astype(dtype)
    # A row near the largest number of a dtype of 16 bits may come back above it.
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(int4.dequantize(codes, scales), -most, most).astype(dtype)


def as_float8(array: Array) -> Array:
    """Bits as the dtype that a GPU's kernel converts; any other array as it is."""
    array = as_floats(array)
    return lax.bitcast_convert_type(array, jnp.float8_e4m3fn) if array.dtype == jnp.uint8 else array


def as_words(codes: Array) -> Array:
    """Codes of a byte, four to an int32, the first in the lowest byte; any other array as `as_floats`.

    For a GPU's compiler it is another name of the same memory. Pallas counts offsets in numbers of an array
    and changes to 64 bits by its bytes: words are few enough where codes would not be.
    """
    if codes.dtype.itemsize > 1:
        return as_floats(codes)
    return lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], -1, WORD), jnp.int32)


def from_words(words: Array, dtype: DTypeLike) -> Array:
    """What `as_words` was given, of this dtype."""
    if jnp.dtype(dtype).itemsize > 1:
        return words if words.dtype == dtype else lax.bitcast_convert_type(words, dtype)
    return lax.bitcast_convert_type(words, dtype).reshape(*words.shape[:-1], -1)


def each_pair(
    write: Callable[[str, Array, Array], Iterable[Array]], pool: Sequence[Array]
) -> tuple[Array, ...]:
    """`write("pages", k, v)` and, if a pool has them, `write("scales", ...)`; codes go as words."""
    words = [as_words(array) for array in pool]
    pairs = zip(("pages", "scales"), words[::2], words[1::2], strict=False)
    written = [part for pair in pairs for part in write(*pair)]
    return tuple(from_words(part, array.dtype) for part, array in zip(written, pool, strict=True))
