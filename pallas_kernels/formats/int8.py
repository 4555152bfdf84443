"""K and V as integers of one byte."""

from collections.abc import Callable
from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.formats.byte_codes import ByteCodes

# From 128 to 256 the step of bfloat16 is 1: the low seven bits are added to 128; then 128 is subtracted, or
# 256 for a negative code.
_TO_BFLOAT16 = """
    lop3.b32 a, r, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 b, r, 0x00800080, 0x43004300, 0xEA;
    mov.b32 c, 0xBF80BF80;
    fma.rn.bf16x2 $0, b, c, a;
"""
# From 1024 to 2048 the step of float16 is 1: flipping a code's sign bit adds 128; then 1152 is subtracted.
_TO_FLOAT16 = """
    lop3.b32 a, r, 0x00FF00FF, 0x64806480, 0x6A;
    mov.b32 c, 0xE480E480;
    add.f16x2 $0, a, c;
"""


class Int8(ByteCodes):
    """See `ByteCodes`."""

    name = "int8"
    storage_dtype = "int8"
    largest = 127.0
    # A tile grows fourfold when it is copied, and two threads cost more than they save. (Conversion of fp8
    # takes longer, so there two threads pay.)
    halves_tiles = True
    # 0xEA is `a & b | c`, and 0x6A is `a & b ^ c`, of a `lop3`.
    assembly = MappingProxyType({"bfloat16": _TO_BFLOAT16, "float16": _TO_FLOAT16})

    def codes(
        self, values: Array, most: Array, inverse: Array, end: float, nearest: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        del end
        return nearest(values * inverse).astype(jnp.int8), most * (1 / self.largest)

    def to_float32(self, codes: Array) -> Array:
        return codes.astype(jnp.float32)

    def from_byte(self, word: Array, nth: int) -> Array:
        return (word << (24 - 8 * nth)) >> 24


FORMATS = (Int8(),)
