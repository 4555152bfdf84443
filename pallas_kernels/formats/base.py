"""The interface of a storage format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.sizes import next_power_of_two
from pallas_kernels.words import WORD, as_words, from_words

if TYPE_CHECKING:
    from pallas_kernels.device import Device
    from pallas_kernels.paged_attention.triton.tuning import Tuning


class Format(ABC):
    """How K and V are stored in a pool; hashable, compared by identity or value.

    The defaults suit a format whose pages hold one value or code per element, with at most one float32 scale
    per token and KV head.

    Attributes:
      name: in configs and commands.
      storage_dtype: of the pages.
      kernel_dtype: of the view of the pages in Triton kernels, and of the pool in tuning tables.
      short: another name, for commands.
      bits: per element, without scales.
      quantized: whether there are scales beside the pages.
      scale_dtype: of the scales.
      shares_copies: whether two threads copy a large tile on a CPU; pays if it is copied without conversion.
      halves_tiles: whether a tile that two threads would copy is halved instead; pays if conversion is cheap.
      max_rows: most rows of a Triton program's matrix product, limited by registers.
      assembly: PTX that converts the two codes in `r` to the values in `$0`, by the name of their dtype; see
        `paged_attention.triton.ptx`.
    """

    name: str
    storage_dtype: str
    short: str | None = None
    bits: int
    quantized: ClassVar[bool] = False
    scale_dtype: ClassVar[str] = "float32"
    shares_copies: bool = False
    halves_tiles: ClassVar[bool] = False
    max_rows: ClassVar[int] = 128
    assembly: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @property
    def kernel_dtype(self) -> str:
        return self.storage_dtype

    # Sizes.

    def row_size(self, head_dim: int) -> int:
        """Elements of the page array per token and head."""
        return head_dim

    def head_dim(self, row_size: int) -> int:
        """The inverse of `row_size`."""
        return row_size

    def scale_shapes(self, pages: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the scales of K and of V, for pages of this shape; none if not quantized."""
        return (tuple(pages[:-1]),) * 2 if self.quantized else ()

    def token_bytes(self, kv_heads: int, head_dim: int) -> int:
        """Bytes of a token's K and V in one layer, including scales."""
        row = kv_heads, self.row_size(head_dim)
        return 2 * prod(row) * jnp.dtype(self.storage_dtype).itemsize + self.scale_bytes(kv_heads, head_dim)

    def scale_bytes(self, kv_heads: int, head_dim: int) -> int:
        """Bytes of a token's scales in one layer."""
        shapes = self.scale_shapes((kv_heads, self.row_size(head_dim)))
        return sum(jnp.dtype(self.scale_dtype).itemsize * prod(shape) for shape in shapes)

    def vector_scale_bytes(self, elements: int) -> int:
        """Bytes of the scales of one vector per token, as in MLA, or of heads that `refuses` excludes."""
        return jnp.dtype(self.scale_dtype).itemsize if self.quantized else 0

    def refuses(self, head_dim: int) -> str | None:
        """What `head_dim` must be, if this one cannot be stored; else None."""
        return None

    # Values.

    @abstractmethod
    def encode(self, values: Float[Array, "*rows head_dim"], *, keys: bool) -> tuple[Array, Array | None]:
        """Encodes rows of K (`keys`) or V; returns codes and scales.

        A quantized format always stores finite values: NaN becomes zero, and an infinity the row's largest
        finite value.
        """

    @abstractmethod
    def decode(self, codes: Array, scales: Array | None, dtype: DTypeLike) -> Float[Array, "*rows head_dim"]:
        """The inverse of `encode`, in any floating dtype."""

    def encode_pair(self, k: Array, v: Array) -> tuple[Array, ...]:
        """Rows of K and V as stored: `(k, v)`, and their scales if there are any."""
        (k, k_scales), (v, v_scales) = self.encode(k, keys=True), self.encode(v, keys=False)
        return (k, v) if k_scales is None or v_scales is None else (k, v, k_scales, v_scales)

    def decode_pair(self, rows: Sequence[Array], dtype: DTypeLike) -> tuple[Array, Array]:
        """The inverse of `encode_pair`, also for pages of a pool."""
        k, v, k_scales, v_scales = rows if len(rows) == 4 else (*rows, None, None)
        return self.decode(k, k_scales, dtype), self.decode(v, v_scales, dtype)

    # Attention, on any backend.

    def queries(self, q: Float[Array, "tokens q_heads head_dim"]) -> tuple[Array, ...]:
        """The queries for each part of a tile's keys; scores are the sum of the products over parts."""
        return (q,)

    def outputs(self, out: Float[Array, "tokens q_heads head_dim"], dtype: DTypeLike) -> Array:
        """The output of attention, from the output over `tile_values`, in the queries' dtype."""
        return out

    # Attention in XLA: a tile is first copied out of the pool.

    @property
    def widened_dtype(self) -> DTypeLike:
        """Dtype of a copied tile."""
        return jnp.float32

    @abstractmethod
    def widen(self, codes: Array) -> Array:
        """Converts a copied tile of codes to `widened_dtype`, without scales."""

    def widened_values(self, codes: Array, scales: Array | None) -> tuple[Array, Array | None]:
        """A tile's rows `[.., widths]`, with the parts for `queries` concatenated; and a factor `[.., 1]`.

        Args:
          codes: from `widen`, `[.., row]`.
          scales: `[.., words]` as stored; 1 word if `scale_shapes` has no such axis.
        """
        return codes, scales

    # Writing in Triton.

    def rows(self, k: Array, v: Array) -> tuple[Array, ...]:
        """The inputs of the append kernel: K and V, or their encoding."""
        return k, v

    def write_view(self, pages: Array) -> Array:
        """The array that the kernel writes to: a view of the same memory."""
        return as_words(pages)

    def from_write_view(self, view: Array) -> Array:
        """The inverse of `write_view`."""
        return from_words(view, self.storage_dtype)

    def encode_in_kernel(self, values: Array) -> tuple[Array, Array]:
        """Elements of `write_view`, and scales; for a quantized format whose `rows` are not encoded."""
        raise NotImplementedError

    # Reading in Triton.

    def parts(self, size: int, tuning: Tuning) -> int:
        """Number of parts of a row; part `n` has the elements `n, n + parts...`

        Args:
          size: elements of the pages.
          tuning: of the kernel.
        """
        return 1

    def read_view(self, pages: Array, parts: int) -> Array:
        """The array that the kernel reads: a view of the same memory."""
        return pages

    def layout(self, head_dim: int, parts: int) -> Layout:
        """The order of a head's elements in a tile."""
        return plain_layout(head_dim, parts)

    def unpack(self, tile: Array) -> tuple[Array, ...]:
        """The parts of a tile `[tokens, words]` of `read_view`."""
        return (tile,)

    def load_scales(self, load: Callable[..., Array], tokens: int, head_dim: int, *, keys: bool) -> Any:
        """The scales of a tile of K or V.

        Args:
          load: loads one scale per token; with indices of words `[1, n]`, these words of each token.
          tokens: per tile.
          head_dim: elements per head.
          keys: whether the tile is of K.
        """
        return load()

    def tile_values(
        self, parts: tuple[Array, ...], scales: Any, layout: Layout
    ) -> tuple[tuple[Array, ...], Array | None]:
        """The values of a tile, in parts for `queries`, and a factor per token or None."""
        return parts, scales

    def product_dtype(self, q_dtype: DTypeLike) -> DTypeLike:
        """The dtype in which queries and keys are multiplied; codes are exact in any 16-bit float."""
        return q_dtype

    # Devices.

    def tuned(self, tuning: Tuning, device: Device, head_dim: int, row_bytes: int) -> Tuning:
        """The rule's tuning, with this format's changes.

        Args:
          tuning: of `paged_attention.triton.tuning.rule`.
          device: the GPU.
          head_dim: of the pool.
          row_bytes: of a head in the dtype of the product, rounded up to a power of two.
        """
        return tuning

    def lacks(self, device: Device, row_size: int, *, converts: bool = True) -> str | None:
        """What a Triton kernel lacks for such pages, or None.

        Args:
          device: the GPU.
          row_size: of the pages.
          converts: whether the kernel converts between codes and values, rather than only moving codes.
        """
        if jnp.dtype(self.storage_dtype).itemsize == 1 and row_size % WORD:
            return f"rows of {row_size} codes: it takes them by fours"
        return None

    def lacks_attention(self, device: Device, head_dim: int, q_dtype: DTypeLike) -> str | None:
        """What else `paged_attention` lacks, such as registers, or None."""
        return None

    def lacks_mass(self) -> str | None:
        """What else `attention_mass` lacks, or None."""
        return None


@dataclass(frozen=True)
class Layout:
    """The order of a head's elements in a program's tiles.

    Attributes:
      head_dim: elements per head.
      word: indices of the loaded elements of a row.
      dims: for each part, the indices of its elements in the head.
      in_words, in_head: `[1, ..]`, which elements of a loaded row, and of a part, exist.
    """

    head_dim: int
    word: Array
    dims: list[Array]
    in_words: Array
    in_head: Array


def plain_layout(head_dim: int, parts: int = 1) -> Layout:
    """A layout in which part `n` has the elements `n, n + parts...`"""
    word = lax.iota(jnp.int32, max(16, next_power_of_two(head_dim // parts)))
    exists = (word < head_dim // parts)[None, :]
    dims = [word * parts + part if parts > 1 else word for part in range(parts)]
    return Layout(head_dim, word, dims, exists, exists)
