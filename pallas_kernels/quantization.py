"""Quantized K and V: codes of one byte, and one float32 scale for each token and KV head."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# The largest code of each dtype. E4M3FN has no infinity, so all of its range is for numbers.
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
# Of the scales that are tried for E4M3FN, to the least.
FACTORS = (1.0, 2**0.25, 2**0.5, 2**0.75)
# Rows below this are stored as zeros: the inverse of their scale would overflow.
_LEAST = 1e-30


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether numbers of this dtype are codes that need a scale."""
    return jnp.dtype(dtype) in LARGEST


def quantize(
    values: Float[Array, "*rows head_dim"],
    dtype: DTypeLike,
    *,
    nearest: Callable[[Array], Array] = jnp.round,
    read: Callable[[Array], Array] | None = None,
) -> tuple[Array, Float[Array, "*rows"]]:
    """Codes and scales: each row's largest magnitude becomes the largest code, or nearly so.

    E4M3FN is finer just above a power of two than just below: of scales up to an octave apart a row takes
    the one with the least squared error.

    A NaN becomes zero and an infinity the row's largest finite number, so that one bad number does not
    spoil its row, and what is stored is always finite. A row of zeros comes back exactly.

    Args:
      values: any floating dtype.
      dtype: int8 or float8_e4m3fn.
      nearest: rounds to an integer, for int8.
      read: codes as float32. Default: `as_float32`.

    Returns:
      `(codes, scales)`, scales float32.
    """
    values, largest = values.astype(jnp.float32), LARGEST[jnp.dtype(dtype)]
    magnitude = jnp.abs(values)
    finite = magnitude <= float(jnp.finfo(jnp.float32).max)
    most = jnp.max(jnp.where(finite, magnitude, 0.0), axis=-1, keepdims=True)
    most = jnp.where(most > _LEAST, most, 0.0)
    inverse = jnp.where(most > 0, largest / jnp.where(most > 0, most, 1.0), 0.0)
    values = jnp.where(values == values, jnp.minimum(jnp.maximum(values, -most), most), 0.0)
    if jnp.dtype(dtype) == jnp.int8:
        return nearest(values * inverse).astype(dtype), (most * (1 / largest))[..., 0]
    factor, least = jnp.ones_like(most), None
    for step in FACTORS:
        scaled = values * (inverse * (1 / step))
        error = scaled - (read or as_float32)(scaled.astype(dtype))
        # In whole numbers, whose sum does not depend on the order: every backend takes the same scale.
        squares = (error * error * (1024 * step * step)).astype(jnp.int32)
        total = jnp.sum(squares, axis=-1, keepdims=True, dtype=jnp.int32)
        factor = factor if least is None else jnp.where(total < least, step, factor)
        least = total if least is None else jnp.minimum(total, least)
    return (values * (inverse * (1 / factor))).astype(dtype), (most * (1 / largest) * factor)[..., 0]


def as_float32(codes: Array) -> Float[Array, "..."]:
    """Codes as numbers; any other array as float32 too.

    E4M3FN is read as float16 with the exponent moved into place, which is 2**-8 of its value: ten times as
    fast on a CPU as XLA's own conversion.
    """
    if codes.dtype != jnp.float8_e4m3fn:
        return codes.astype(jnp.float32)
    bits = lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint16)
    bits = (bits & 0x80) << 8 | (bits & 0x7F) << 7
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 256


def dequantize(
    codes: Array, scales: Float[Array, "*rows"], dtype: DTypeLike
) -> Float[Array, "*rows head_dim"]:
    """The numbers that codes stand for."""
    return (as_float32(codes) * scales[..., None]).astype(dtype)
