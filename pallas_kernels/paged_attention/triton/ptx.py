"""Converts one-byte codes to 16-bit values in PTX, two at a time; see `Format.assembly`.

A compiled cast uses the conversion unit, which has a quarter of the throughput of the other units and
dominated decode. Here the bits of a code are moved to the fields of a float instead.
"""

from collections.abc import Sequence

import jax
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

# Selects the same byte of two words ($1, $2): twice into the low and twice into the high half of a register.
_SELECT = "prmt.b32 r, $1, $2, {};"
_BYTES = "0x4400", "0x5511", "0x6622", "0x7733"


def values(words: jax.Array, assembly: str, dtype: DTypeLike) -> Sequence[jax.Array]:
    """The values of the four codes of each word, as four arrays, lowest byte first.

    Args:
      words: int32, an even number of elements per thread.
      assembly: of the format, for this dtype: converts the codes in `r`, a byte twice in each half, to `$0`;
        may use `a`, `b` and `c`.
      dtype: bfloat16 or float16, in which every code is exact.
    """
    result = [jax.ShapeDtypeStruct(words.shape, dtype)]
    # One result per call: Pallas does not lower more.
    return [
        plgpu.elementwise_inline_asm(
            f"{{ .reg .b32 r, a, b, c; {_SELECT.format(byte)} {assembly} }}",
            args=[words],
            constraints="=r,r,r",
            pack=2,
            result_shape_dtypes=result,
        )[0]
        for byte in _BYTES
    ]
