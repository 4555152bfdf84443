"""Scores in Triton: matrix products, scales and softcap."""

from collections.abc import Callable
from functools import lru_cache, reduce
from math import e, log2
from operator import add

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.formats import Format
from pallas_kernels.paged_attention.triton.tuning import Tuning

# The softmax uses powers of two.
LOG2E = log2(e)


@lru_cache
def product_for(q_dtype, storage: Format, tuning: Tuning, interpret: bool) -> Callable:
    """The matrix product of queries with keys, and of weights with values."""
    wide = storage.product_dtype(q_dtype)
    # The interpreter runs on a CPU, which has no TF32.
    precision = lax.Precision.HIGHEST if interpret else tuning.precision(q_dtype, storage.kernel_dtype)

    def product(a, b, **transposed):
        return plgpu.dot(a.astype(wide), b.astype(wide), precision=precision, **transposed)

    return product


def add_up(product: Callable, a, b):
    """The sum over parts of the products of `a` with the transpose of `b`."""
    return reduce(add, (product(*pair, trans_b=True) for pair in zip(a, b, strict=True)))


def scale_in_two(scale: float) -> tuple[float, float]:
    """Factors for the scores, small enough not to overflow, and for the differences of scores.

    Their product is `scale * log2(e)`. For most scales, which are below 1, the second factor is 1.
    """
    first = min(scale * LOG2E, 1.0)
    return first, scale * LOG2E / first


def cap(scores, scale: float, softcap: float):
    """Softcap of scaled scores, applied to scores before their scale."""
    return (softcap / scale) * _tanh(scores * (scale / softcap))


def _tanh(x):
    # Triton's tanh calls the vendor's library; this takes one exponential. Near zero, where the difference
    # would lose digits, it uses the series.
    square = x * x
    series = x * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return jnp.where(square < 0.04, series, 1.0 - 2.0 / (jnp.exp2((2.0 * LOG2E) * x) + 1.0))
