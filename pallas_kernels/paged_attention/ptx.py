"""Codes of a byte become numbers of 16 bits in NVIDIA's assembly, two at a time.

What a compiler makes of a cast goes through the unit that converts, a quarter as fast as the others: of
decode, that was the most. Here a code's bits are put where a float has its own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

# Of two words ($1 and $2) the same byte of each: twice in the low and twice in the high half of a register.
_SELECT = "prmt.b32 r, $1, $2, {};"
_BYTES = "0x4400", "0x5511", "0x6622", "0x7733"

# a & b | c, and a & b ^ c, of a `lop3`.
_AND_OR, _AND_XOR = "0xEA", "0x6A"
# From 128 to 256 a bfloat16 counts in ones: seven bits below 128, less 128 or, for a negative code, 256.
_INT8_TO_BFLOAT16 = f"""
    lop3.b32 a, r, 0x007F007F, 0x43004300, {_AND_OR};
    lop3.b32 b, r, 0x00800080, 0x43004300, {_AND_OR};
    mov.b32 c, 0xBF80BF80;
    fma.rn.bf16x2 $0, b, c, a;
"""
# From 1024 to 2048 a float16 counts in ones: a code with its sign flipped is 128 more, less 1152.
_INT8_TO_FLOAT16 = f"""
    lop3.b32 a, r, 0x00FF00FF, 0x64806480, {_AND_XOR};
    mov.b32 c, 0xE480E480;
    add.f16x2 $0, a, c;
"""
# Exponents start 120 lower in a bfloat16, and 8 lower in a float16; subnormal codes are subnormal there too.
_E4M3 = f"""
    and.b32 a, r, 0x7F007F00;
    shr.b32 a, a, {{shift}};
    lop3.b32 a, r, 0x80008000, a, {_AND_OR};
    mov.b32 b, {{power}};
    mov.b32 c, 0x80008000;
    fma.rn.{{kind}} $0, a, b, c;
"""
_CONVERSIONS = {
    ("int8", "bfloat16"): _INT8_TO_BFLOAT16,
    ("int8", "float16"): _INT8_TO_FLOAT16,
    ("uint8", "bfloat16"): _E4M3.format(shift=4, power="0x7B807B80", kind="bf16x2"),
    ("uint8", "float16"): _E4M3.format(shift=1, power="0x5C005C00", kind="f16x2"),
}


def converts(codes: DTypeLike, dtype: DTypeLike) -> bool:
    """Whether there is assembly for it."""
    return (jnp.dtype(codes).name, jnp.dtype(dtype).name) in _CONVERSIONS


def numbers(words: jax.Array, codes: DTypeLike, dtype: DTypeLike) -> Sequence[jax.Array]:
    """What the four codes of each word stand for, by their place in it: lowest byte first.

    Args:
      words: int32, of an even number of elements a thread.
      codes: int8, or uint8 (E4M3FN).
      dtype: bfloat16 or float16, in which every code is exact.
    """
    convert = _CONVERSIONS[jnp.dtype(codes).name, jnp.dtype(dtype).name]
    result = [jax.ShapeDtypeStruct(words.shape, dtype)]
    # One result each: Pallas lowers no more of them.
    return [
        plgpu.elementwise_inline_asm(
            f"{{ .reg .b32 r, a, b, c; {_SELECT.format(place)} {convert} }}",
            args=[words],
            constraints="=r,r,r",
            pack=2,
            result_shape_dtypes=result,
        )[0]
        for place in _BYTES
    ]
