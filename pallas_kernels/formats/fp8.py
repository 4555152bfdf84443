"""K and V as float8 E4M3FN, stored as uint8.

XLA on a CPU would convert and copy a whole array of its own float8 dtype for each write.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.formats.byte_codes import ByteCodes

if TYPE_CHECKING:
    from pallas_kernels.device import Device

# Candidate scales, as multiples of the one that maps the largest value to the largest code.
_FACTORS = (1.0, 2**0.25, 2**0.5, 2**0.75)
# The exponent bias is 120 below bfloat16's and 8 below float16's; subnormal codes stay subnormal there.
# 0xEA is `a & b | c` of a `lop3`.
_ASSEMBLY = """
    and.b32 a, r, 0x7F007F00;
    shr.b32 a, a, {shift};
    lop3.b32 a, r, 0x80008000, a, 0xEA;
    mov.b32 b, {power};
    mov.b32 c, 0x80008000;
    fma.rn.{kind} $0, a, b, c;
"""


class E4M3(ByteCodes):
    """See `ByteCodes`.

    E4M3FN is relatively coarser just above a power of two than just below, so each row uses the candidate
    scale with the least squared error.
    """

    name = "fp8"
    storage_dtype = "uint8"
    largest = 448.0
    assembly = MappingProxyType(
        {
            "bfloat16": _ASSEMBLY.format(shift=4, power="0x7B807B80", kind="bf16x2"),
            "float16": _ASSEMBLY.format(shift=1, power="0x5C005C00", kind="f16x2"),
        }
    )

    def codes(
        self, values: Array, most: Array, inverse: Array, end: float, nearest: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        del nearest
        factor, least = jnp.ones_like(most), None
        for step in _FACTORS:
            scaled = values * (inverse * (1 / step))
            error = scaled - self.to_float32(_to_bits(scaled))
            # As integers, whose sum is independent of its order: backends agree except for near ties.
            squares = (error * error * (1024 * step * step)).astype(jnp.int32)
            total = jnp.sum(squares, axis=-1, keepdims=True, dtype=jnp.int32)
            factor = factor if least is None else jnp.where(total < least, step, factor)
            least = total if least is None else jnp.minimum(total, least)
        factor = jnp.where(most < end, factor, 1.0)
        return _to_bits(values * (inverse * (1 / factor))), most * (1 / self.largest) * factor

    def to_float32(self, codes: Array) -> Array:
        # The bits, shifted to float16's fields, are 2**-8 of the value. On a CPU this is ten times as fast as
        # XLA's own conversion.
        bits = codes.astype(jnp.uint16)
        bits = (bits & 0x80) << 8 | (bits & 0x7F) << 7
        return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 256

    def read_view(self, pages: Array, parts: int) -> Array:
        return super().read_view(pages, parts) if parts > 1 else _from_bits(pages)

    def from_byte(self, word: Array, nth: int) -> Array:
        return _from_bits(((word >> (8 * nth)) & 0xFF).astype(jnp.uint8))

    def lacks(self, device: Device, row_size: int, *, converts: bool = True) -> str | None:
        if reason := super().lacks(device, row_size, converts=converts):
            return reason
        if converts and device.platform == "cuda" and int(device.arch[3:]) < 89:
            return f"uint8 (E4M3FN) on {device.arch}: GPUs convert it from sm_89 on"
        return None


def _to_bits(values: Array) -> Array:
    return lax.bitcast_convert_type(values.astype(jnp.float8_e4m3fn), jnp.uint8)


def _from_bits(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)


FORMATS = (E4M3(),)
