"""Base of the formats with one byte per element and one float32 scale per token and KV head.

Triton kernels read codes as words of four, sixteen bytes at a time. The elements 0, 4, 8... of a row, which
are the lowest bytes of its words, form one product, the elements 1, 5, 9... the next.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.formats.base import Format
from pallas_kernels.words import WORD, as_words

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.triton.tuning import Tuning

# Rows with a smaller maximum are stored as zeros, since the inverse of their scale would overflow.
_LEAST = 1e-30


class ByteCodes(Format):
    """One byte per element.

    Attributes:
      largest: the largest code.
    """

    bits = 8
    quantized = True
    largest: ClassVar[float]

    @abstractmethod
    def codes(
        self, values: Array, most: Array, inverse: Array, end: float, nearest: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        """Codes and scales `[.., 1]` of float32 rows.

        Args:
          values: finite, no magnitude above `most`.
          most: `[.., 1]`, the largest magnitude of each row.
          inverse: `largest / most`; 0 for a row of zeros.
          end: from this `most` on, a scale up to twice as large may decode to values beyond the row's dtype.
          nearest: rounds to an integer.
        """

    @abstractmethod
    def to_float32(self, codes: Array) -> Array:
        """The values of codes, without their scale."""

    @abstractmethod
    def from_byte(self, word: Array, nth: int) -> Array:
        """The nth code of each int32, from the lowest byte, in a dtype in which it is exact."""

    def quantize(
        self, values: Float[Array, "*rows head_dim"], nearest: Callable[[Array], Array] = jnp.round
    ) -> tuple[Array, Float[Array, "*rows"]]:
        """Codes and scales, where each row's largest magnitude becomes about the largest code.

        A row of zeros is exact.

        Args:
          values: any floating dtype.
          nearest: rounds to an integer, if codes are integers.
        """
        end = 0.9 * float(jnp.finfo(values.dtype).max)
        values = values.astype(jnp.float32)
        magnitude = jnp.abs(values)
        finite = magnitude <= float(jnp.finfo(jnp.float32).max)
        most = jnp.max(jnp.where(finite, magnitude, 0.0), axis=-1, keepdims=True)
        most = jnp.where(most > _LEAST, most, 0.0)
        inverse = jnp.where(most > 0, self.largest / jnp.where(most > 0, most, 1.0), 0.0)
        values = jnp.where(values == values, jnp.minimum(jnp.maximum(values, -most), most), 0.0)
        codes, scales = self.codes(values, most, inverse, end, nearest)
        return codes, scales[..., 0]

    def encode(self, values: Array, *, keys: bool) -> tuple[Array, Array]:
        del keys
        return self.quantize(values)

    def decode(self, codes: Array, scales: Array | None, dtype: DTypeLike) -> Array:
        assert scales is not None
        return (self.to_float32(codes) * scales[..., None]).astype(dtype)

    def widen(self, codes: Array) -> Array:
        return self.to_float32(codes)

    def encode_in_kernel(self, values: Array) -> tuple[Array, Array]:
        # Triton has no rounding of halves to even.
        codes, scale = self.quantize(values, nearest=lambda x: jnp.floor(x + 0.5))
        return _pack(codes), scale

    def parts(self, size: int, tuning: Tuning) -> int:
        # Pallas cannot address so many single bytes; see `as_words`.
        return WORD if 2**31 < size <= 2**32 else tuning.codes_a_word

    def read_view(self, pages: Array, parts: int) -> Array:
        return as_words(pages) if parts > 1 else pages

    def unpack(self, tile: Array) -> tuple[Array, ...]:
        if tile.dtype != jnp.int32:
            return (tile,)
        return tuple(self.from_byte(tile, nth) for nth in range(WORD))


def _pack(codes: Array) -> Array:
    """As `as_words`, with operations that Triton supports."""
    heads, dims = codes.shape
    bytes_ = (codes.astype(jnp.int32) & 0xFF).reshape(heads, dims // WORD, WORD)
    return jnp.sum(bytes_ << (8 * lax.iota(jnp.int32, WORD)[None, None, :]), axis=-1, dtype=jnp.int32)
