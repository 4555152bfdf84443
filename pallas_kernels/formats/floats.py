"""K and V unquantized, in 16 or 32 bits.

Before JAX 0.11, XLA on a CPU converts a whole bfloat16 pool to float32 and back for each write. There a
bfloat16 pool stores the bits as uint16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.formats.base import Format

if TYPE_CHECKING:
    from pallas_kernels.device import Device

_BFLOAT16, _OTHER = ("uint16", "bfloat16") if jax.__version_info__ < (0, 11) else ("bfloat16", "uint16")


@dataclass(frozen=True)
class Float(Format):
    """A floating dtype, stored as such or as unsigned integers of the same width."""

    name: str
    storage_dtype: str
    bits: int
    short: str | None = None
    shares_copies: bool = False

    @property
    def kernel_dtype(self) -> str:
        return self.name

    def encode(self, values: Array, *, keys: bool) -> tuple[Array, None]:
        del keys
        return self.from_write_view(values.astype(self.name)), None

    def decode(self, codes: Array, scales: Array | None, dtype: DTypeLike) -> Array:
        del scales
        return self.write_view(codes).astype(dtype)

    def widen(self, codes: Array) -> Array:
        return self.decode(codes, None, jnp.float32)

    def write_view(self, pages: Array) -> Array:
        # On a GPU it is a view of the same memory, on a CPU a copy: slice first.
        return lax.bitcast_convert_type(pages, self.name) if self.storage_dtype != self.name else pages

    def from_write_view(self, view: Array) -> Array:
        return lax.bitcast_convert_type(view, self.storage_dtype) if self.storage_dtype != self.name else view

    def read_view(self, pages: Array, parts: int) -> Array:
        del parts
        return self.write_view(pages)

    def product_dtype(self, q_dtype: DTypeLike) -> DTypeLike:
        # If the dtypes of queries and keys differ, they are multiplied in float32.
        return q_dtype if jnp.dtype(q_dtype) == self.name else jnp.float32

    def lacks(self, device: Device, row_size: int, *, converts: bool = True) -> str | None:
        return self.name if self.bits > 32 else super().lacks(device, row_size, converts=converts)


FORMATS = (
    Float("float32", "float32", 32, "f32", shares_copies=True),
    Float("bfloat16", _BFLOAT16, 16, "bf16"),
    Float("float16", "float16", 16, "f16"),
)
ALSO_READ = (Float("bfloat16", _OTHER, 16), Float("float64", "float64", 64))
