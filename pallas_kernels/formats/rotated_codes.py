"""K and V in four bits per element: eight codes per int32, and words of scales.

A row is a head of one token. A Hadamard rotation spreads the outliers of keys evenly (QuaRot,
arXiv:2404.00456). The rotated row is quantized in groups of about 32 elements, each with a step and a zero
point. Attention works on rotated rows, since the product of two rows does not change if both are rotated.

    codes      word w has, from the lowest bits, the elements w, w + words, w + 2 * words ...
    scales     a word per two groups: 8 bits of exponent, 7 + 7 of steps, 5 + 5 of zero points in half steps
    outliers   of keys, a word per two groups: 8 bits of exponent, 6 + 6 of index, 6 + 6 of value

A key's error is multiplied by the query, and both are largest in the same few elements. So the largest
element of each group, its outlier, is stored separately, and only the rest is rotated.

All sums are of integers, or of steps of few bits, so they do not depend on the order of summation, and all
backends give the same codes.
"""

from math import log2

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# Codes per word, and bits per code.
CODES, BITS = 8, 4
_LARGEST = 2**BITS - 1
# Elements are rounded to 1/64 of a step before they become codes.
_FINE = 6
# Rows with a smaller maximum are stored as zeros, and elements are clipped to its inverse.
_LEAST = 2.0**-90
# Smaller steps count as 0, since the exponent of their unit would underflow.
_NO_STEP = 2.0**-105
# A row is scaled to integers of fewer bits before the rotation, so that sums of 256 are exact in float32.
_WHOLE_BITS = 16


def num_groups(head_dim: int) -> int:
    """Groups per row: even, at most one per code of a word, as many as have at least 32 elements each.

    Example:
      >>> [head_dim // num_groups(head_dim) for head_dim in (64, 80, 96, 128, 256)]
      [32, 40, 48, 32, 32]
    """
    return min(CODES, max(2, 2 ** int(log2(max(head_dim, 32) / 32))))


def num_scale_words(head_dim: int, *, keys: bool) -> int:
    """Words per row in addition to its codes."""
    return num_groups(head_dim) // 2 * (2 if keys else 1)


def rotate_queries(q: Float[Array, "*rows head_dim"]) -> Float[Array, "*rows head_dim"]:
    """Rotates queries for products with stored rows; also rotates the output of attention back; float32."""
    return _rotate(q.astype(jnp.float32), stored=False)


def quantize(
    values: Float[Array, "*rows head_dim"], *, keys: bool
) -> tuple[Int[Array, "*rows words"], Int[Array, "*rows scale_words"]]:
    """Codes and scales, eight elements and two groups per word.

    Stored values are finite: NaN becomes zero and an infinity the row's largest finite value. A row of zeros
    is exact.

    Args:
      values: any floating dtype; `head_dim` a multiple of 8.
      keys: whether to store outliers separately.
    """
    head_dim = values.shape[-1]
    values = _finite(values.astype(jnp.float32))
    grouped = _by_group(values)
    outlier_words = ()
    if keys:
        outliers, word = _take_outliers(grouped)
        values, outlier_words = values - outliers.reshape(values.shape), (word,)
    rotated = _by_group(_rotate_exactly(values))
    codes, step, zero = _codes(rotated)
    codes = codes.reshape(*values.shape[:-1], CODES, head_dim // CODES)
    shifts = _column(codes.ndim) * BITS
    words = jnp.sum(codes << shifts, axis=-2, dtype=jnp.int32)
    return words, jnp.concatenate([_pack_scales(step, zero), *outlier_words], axis=-1)


def dequantize(
    words: Int[Array, "*rows words"], scales: Int[Array, "*rows scale_words"]
) -> Float[Array, "*rows head_dim"]:
    """The values of a row, float32."""
    rotated, *outliers = dequantize_rotated(words, scales)
    return sum(outliers, start=rotate_queries(rotated))


def dequantize_rotated(
    words: Int[Array, "*rows words"], scales: Int[Array, "*rows scale_words"]
) -> tuple[Float[Array, "*rows head_dim"], ...]:
    """The rotated values and, for keys, the outliers, which are not rotated."""
    head_dim = CODES * words.shape[-1]
    pairs = num_groups(head_dim) // 2
    shifts = _column(words.ndim + 1) * BITS
    codes = _by_group(((words[..., None, :] >> shifts) & _LARGEST).reshape(*words.shape[:-1], head_dim))
    step, zero = _of_both(step_of, scales[..., :pairs])
    rotated = (codes.astype(jnp.float32) - 0.5 * zero[..., None].astype(jnp.float32)) * step[..., None]
    rotated = rotated.reshape(*words.shape[:-1], head_dim)
    if scales.shape[-1] == pairs:
        return (rotated,)
    index, value = _of_both(outlier_of, scales[..., pairs:])
    here = index[..., None] == _row(index.ndim + 1, codes.shape[-1])
    return rotated, jnp.where(here, value[..., None], 0.0).reshape(rotated.shape)


def _row(ndim: int, size: int) -> Array:
    """`0, 1, ...` along the last of `ndim` axes."""
    return jnp.arange(size, dtype=jnp.int32).reshape(*(1,) * (ndim - 1), size)


def _column(ndim: int) -> Array:
    """`0, 1, ...` for each code of a word, along the last axis but one."""
    return jnp.arange(CODES, dtype=jnp.int32).reshape(*(1,) * (ndim - 2), CODES, 1)


def step_of(word: Array, nth: int | Array) -> tuple[Array, Array]:
    """The step of one of a word's two groups, and its zero point in half steps."""
    significand = (word >> (17 - 7 * nth)) & 0x7F
    return _unit(word) * significand.astype(jnp.float32), (word >> (5 - 5 * nth)) & 0x1F


def outlier_of(word: Array, nth: int | Array) -> tuple[Array, Array]:
    """The index in its group of one of a word's two outliers, and its value."""
    value = ((word >> (6 - 6 * nth)) & 0x3F) - 32
    return (word >> (18 - 6 * nth)) & 0x3F, _unit(word) * value.astype(jnp.float32)


def _unit(word):
    """The power of two whose exponent is in the highest bits."""
    return lax.bitcast_convert_type((word >> 1) & 0x7F800000, jnp.float32)


def _of_both(read, words):
    """Results of `read` for both groups of each word, `[*rows, groups]`."""
    both = zip(read(words, 0), read(words, 1), strict=True)
    return tuple(jnp.stack(pair, axis=-1).reshape(*words.shape[:-1], -1) for pair in both)


def _finite(values):
    magnitude = jnp.abs(values)
    finite = magnitude <= float(jnp.finfo(jnp.float32).max)
    most = jnp.max(jnp.where(finite, magnitude, 0.0), axis=-1, keepdims=True)
    most = jnp.where(most > _LEAST, jnp.minimum(most, 1 / _LEAST), 0.0)
    return jnp.where(values == values, jnp.minimum(jnp.maximum(values, -most), most), 0.0)


def _by_group(values):
    return values.reshape(*values.shape[:-1], num_groups(values.shape[-1]), -1)


def _power(values, bits: int):
    """`(unit, 1 / unit)`, powers of two with `2**(bits - 1) <= values / unit < 2**bits`.

    Both are zero for values up to `_NO_STEP`.
    """
    exponent = lax.bitcast_convert_type(values, jnp.int32) & 0x7F800000
    shift, some = (bits - 1) << 23, values > _NO_STEP
    unit = jnp.where(some, exponent - shift, 0), jnp.where(some, (254 << 23) - exponent + shift, 0)
    return tuple(lax.bitcast_convert_type(part, jnp.float32) for part in unit)


def _pair_power(values, bits: int):
    """`_power` of the larger of two adjacent groups: the unit per pair, the inverse per group."""
    most = jnp.max(values.reshape(*values.shape[:-1], -1, 2), axis=-1)
    unit, inverse = _power(most, bits)
    return unit, jnp.repeat(inverse, 2, axis=-1)


def _pack(unit, fields):
    """Packs an exponent and, for each of two groups, fields of the given bits, the first highest."""
    word, at = (lax.bitcast_convert_type(unit, jnp.int32) & 0x7F800000) << 1, 24
    for bits, field in fields:
        for nth in range(2):
            at -= bits
            word |= field[..., nth::2] << at
    return word


def _take_outliers(grouped):
    """The largest element of each group as it will be decoded, zeros elsewhere; and its words."""
    index = jnp.argmax(jnp.abs(grouped), axis=-1).astype(jnp.int32)
    here = index[..., None] == _row(grouped.ndim, grouped.shape[-1])
    largest = jnp.sum(jnp.where(here, grouped, 0.0), axis=-1)
    unit, inverse = _pair_power(jnp.abs(largest), 5)
    value = jnp.clip(jnp.round(largest * inverse), -31, 31)
    outliers = jnp.where(here, (value * jnp.repeat(unit, 2, axis=-1))[..., None], 0.0)
    return outliers, _pack(unit, ((6, index), (6, value.astype(jnp.int32) + 32)))


def _codes(rotated):
    """Codes of groups `[.., groups, elements]`; the step, float32, and zero point of each."""
    low = jnp.minimum(jnp.min(rotated, axis=-1), 0.0)
    high = jnp.maximum(jnp.max(rotated, axis=-1), 0.0)
    # With a zero point within a quarter step of the best, all elements are within half a step of a code.
    step = (high - low) * (1 / (_LARGEST + 0.5))
    inverse = jnp.where(step > _NO_STEP, 2.0**_FINE / jnp.maximum(step, _NO_STEP), 0.0)
    fine = jnp.round(rotated * inverse[..., None]).astype(jnp.int32)
    middle = jnp.round((low + high) * inverse).astype(jnp.int32)
    half = 1 << (_FINE - 1)
    zero = jnp.clip(((_LARGEST << _FINE) - middle + half) >> _FINE, 0, 2 * _LARGEST + 1)
    codes = jnp.clip((fine + half * zero[..., None] + half) >> _FINE, 0, _LARGEST)
    # The step for which the product of the row with its decoded codes is exact, as for a query like the row.
    in_halves = 2 * codes - zero[..., None]
    squares = jnp.sum(fine * fine, axis=-1, dtype=jnp.int32).astype(jnp.float32)
    product = jnp.sum(fine * in_halves, axis=-1, dtype=jnp.int32).astype(jnp.float32)
    return codes, step * (squares / jnp.maximum(product * half, 1.0)), zero


def _pack_scales(step, zero):
    unit, inverse = _pair_power(step, 7)
    significand = jnp.clip(jnp.round(step * inverse), 0, 127).astype(jnp.int32)
    return _pack(unit, ((7, significand), (5, zero)))


def _rotate_exactly(values):
    """The rotation of stored rows, computed exactly on values rounded to integers."""
    unit, inverse = _power(jnp.max(jnp.abs(values), axis=-1, keepdims=True), _WHOLE_BITS)
    return _rotate(jnp.round(values * inverse), stored=True) * unit


def _rotate(values, *, stored: bool):
    """Multiplies by the Hadamard matrix and a power of two, so that the two rotations are inverse."""
    signs, factors = _hadamard(values.shape[-1], stored)
    return jnp.matmul(values, jnp.asarray(signs), precision="highest") * factors.reshape(
        *(1,) * (values.ndim - 1), -1
    )


def _hadamard(head_dim: int, stored: bool) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of Hadamard blocks, the largest first, and a factor per column."""
    signs, factors, begin = np.zeros((head_dim, head_dim), np.float32), np.zeros(head_dim, np.float32), 0
    while begin < head_dim:
        doublings = (head_dim - begin).bit_length() - 1
        block = np.ones((1, 1), np.float32)
        for _ in range(doublings):
            block = np.block([[block, block], [block, -block]])
        here = slice(begin, begin + len(block))
        signs[here, here] = block
        factors[here] = 0.5 ** ((doublings + 1) // 2 if stored else doublings // 2)
        begin += len(block)
    return signs, factors
