"""Codes of a byte become values of 16 bits in NVIDIA's assembly, two at a time: see `Format.assembly`.

What a compiler makes of a cast goes through the unit that converts, a quarter as fast as the others: of
decode, that was the most. Here a code's bits are put where a float has its own.
"""

from collections.abc import Sequence

import jax
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

# Of two words ($1 and $2) the same byte of each: twice in the low and twice in the high half of a register.
_SELECT = "prmt.b32 r, $1, $2, {};"
_BYTES = "0x4400", "0x5511", "0x6622", "0x7733"


def values(words: jax.Array, assembly: str, dtype: DTypeLike) -> Sequence[jax.Array]:
    """What the four codes of each word stand for, by their place in it: lowest byte first.

    Args:
      words: int32, of an even number of elements a thread.
      assembly: of the format, for this dtype: from the codes in `r`, a byte twice in each half, to `$0`, with
        `a`, `b` and `c` to use.
      dtype: bfloat16 or float16, in which every code is exact.
    """
    result = [jax.ShapeDtypeStruct(words.shape, dtype)]
    # One result each: Pallas lowers no more of them.
    return [
        plgpu.elementwise_inline_asm(
            f"{{ .reg .b32 r, a, b, c; {_SELECT.format(place)} {assembly} }}",
            args=[words],
            constraints="=r,r,r",
            pack=2,
            result_shape_dtypes=result,
        )[0]
        for place in _BYTES
    ]
