"""What a storage format says of itself."""

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
    """How K and V lie in a pool; hashable, and compared by identity or value.

    The defaults are those of a format whose pages hold a value, or the code of one, for each element of a
    head, with at most one float32 scale for each token and KV head.

    Attributes:
      name: in configs and commands.
      storage_dtype: of the pages.
      kernel_dtype: of what Triton kernels are handed for them, and of the pool in tables of tunings.
      short: another name that commands take.
      bits: of an element; scales are not counted.
      quantized: whether there are scales beside the pages.
      scale_dtype: of the scales.
      shares_copies: on a CPU a large tile is copied by two threads, for it is only copied.
      halves_tiles: a tile that two threads would copy is halved instead, for it is cheap to convert.
      max_rows: of a Triton program's matrix product, where registers bound it.
      assembly: NVIDIA's assembly that makes two elements of what lies in `r` the values in `$0`, by the name
        of their dtype: see `paged_attention.triton.ptx`.
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
        """Elements of the pages' array that hold a head of one token."""
        return head_dim

    def head_dim(self, row_size: int) -> int:
        """The reverse."""
        return row_size

    def scale_shapes(self, pages: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the scales of K and of V, for pages of this shape; none if not quantized."""
        return (tuple(pages[:-1]),) * 2 if self.quantized else ()

    def token_bytes(self, kv_heads: int, head_dim: int) -> int:
        """K and V of a token in one layer, scales included."""
        row = kv_heads, self.row_size(head_dim)
        return 2 * prod(row) * jnp.dtype(self.storage_dtype).itemsize + self.scale_bytes(kv_heads, head_dim)

    def scale_bytes(self, kv_heads: int, head_dim: int) -> int:
        """The scales of a token in one layer."""
        shapes = self.scale_shapes((kv_heads, self.row_size(head_dim)))
        return sum(jnp.dtype(self.scale_dtype).itemsize * prod(shape) for shape in shapes)

    def vector_scale_bytes(self, elements: int) -> int:
        """The scales of a token's one vector, as MLA keeps, or of heads that `refuses` names."""
        return jnp.dtype(self.scale_dtype).itemsize if self.quantized else 0

    def refuses(self, head_dim: int) -> str | None:
        """What a `head_dim` must be that cannot be stored; None for one that can."""
        return None

    # Values.

    @abstractmethod
    def encode(self, values: Float[Array, "*rows head_dim"], *, keys: bool) -> tuple[Array, Array | None]:
        """What the pages hold of rows of K (`keys`) or V, and their scales.

        What is stored is always finite in a quantized format: a NaN becomes zero, and an infinity the row's
        largest finite value.
        """

    @abstractmethod
    def decode(self, codes: Array, scales: Array | None, dtype: DTypeLike) -> Float[Array, "*rows head_dim"]:
        """The reverse, in any floating dtype."""

    def encode_pair(self, k: Array, v: Array) -> tuple[Array, ...]:
        """Rows of K and V as a pool keeps them: `(k, v)`, and their scales if there are any."""
        (k, k_scales), (v, v_scales) = self.encode(k, keys=True), self.encode(v, keys=False)
        return (k, v) if k_scales is None or v_scales is None else (k, v, k_scales, v_scales)

    def decode_pair(self, rows: Sequence[Array], dtype: DTypeLike) -> tuple[Array, Array]:
        """K and V of what `encode_pair` gave, or of pages of a pool."""
        k, v, k_scales, v_scales = rows if len(rows) == 4 else (*rows, None, None)
        return self.decode(k, k_scales, dtype), self.decode(v, v_scales, dtype)

    # Attention, on any backend.

    def queries(self, q: Float[Array, "tokens q_heads head_dim"]) -> tuple[Array, ...]:
        """The queries that meet each part of a tile's keys; scores are the sum of their products."""
        return (q,)

    def outputs(self, out: Float[Array, "tokens q_heads head_dim"], dtype: DTypeLike) -> Array:
        """The output of attention over the values as tiles give them, in the queries' dtype."""
        return out

    # Attention in XLA: a tile is copied out of the pool, and then read.

    @property
    def widened_dtype(self) -> DTypeLike:
        """Of a copied tile."""
        return jnp.float32

    @abstractmethod
    def widen(self, codes: Array) -> Array:
        """A copied tile: codes, whatever their scales, in `widened_dtype`."""

    def widened_values(self, codes: Array, scales: Array | None) -> tuple[Array, Array | None]:
        """A tile's rows `[.., widths]`, the parts that `queries` meet side by side; and a factor `[.., 1]`.

        Args:
          codes: from `widen`, `[.., row]`.
          scales: `[.., words]` as they are stored, 1 word where `scale_shapes` has none.
        """
        return codes, scales

    # Writing in Triton.

    def rows(self, k: Array, v: Array) -> tuple[Array, ...]:
        """What a kernel of append is given: K and V, or what was made of them before."""
        return k, v

    def write_view(self, pages: Array) -> Array:
        """The array that the kernel writes to: another name of the same memory."""
        return as_words(pages)

    def from_write_view(self, view: Array) -> Array:
        """The reverse."""
        return from_words(view, self.storage_dtype)

    def encode_in_kernel(self, values: Array) -> tuple[Array, Array]:
        """Of a quantized format whose `rows` are not encoded: elements of `write_view`, and scales."""
        raise NotImplementedError

    # Reading in Triton.

    def parts(self, size: int, tuning: Tuning) -> int:
        """In how many parts a row comes: part `n` is the elements `n, n + parts...`

        Args:
          size: elements of the pages.
          tuning: of the kernel.
        """
        return 1

    def read_view(self, pages: Array, parts: int) -> Array:
        """The array that the kernel reads: another name of the same memory."""
        return pages

    def layout(self, head_dim: int, parts: int) -> Layout:
        """Where the elements of a head lie in a tile."""
        return plain_layout(head_dim, parts)

    def unpack(self, tile: Array) -> tuple[Array, ...]:
        """The parts of a tile `[tokens, words]` of `read_view`."""
        return (tile,)

    def load_scales(self, load: Callable[..., Array], tokens: int, head_dim: int, *, keys: bool) -> Any:
        """The scales of a tile of K or V.

        Args:
          load: without arguments, a scale for each token; with words `[1, n]`, those of each token.
          tokens: of a tile.
          head_dim: of a head.
          keys: K or V.
        """
        return load()

    def tile_values(
        self, parts: tuple[Array, ...], scales: Any, layout: Layout
    ) -> tuple[tuple[Array, ...], Array | None]:
        """What a tile holds, in parts that `queries` meet, and a factor for each token or None."""
        return parts, scales

    def product_dtype(self, q_dtype: DTypeLike) -> DTypeLike:
        """In which queries and keys are multiplied. Codes are exact in any dtype of 16 bits."""
        return q_dtype

    # Devices.

    def tuned(self, tuning: Tuning, device: Device, head_dim: int, row_bytes: int) -> Tuning:
        """The rule's tuning, changed where this format wants another.

        Args:
          tuning: of `paged_attention.triton.tuning.rule`.
          device: the GPU.
          head_dim: of the pool.
          row_bytes: of a head as it is multiplied, up to a power of two.
        """
        return tuning

    def lacks(self, device: Device, row_size: int, *, converts: bool = True) -> str | None:
        """What a Triton kernel lacks for such pages, if anything.

        Args:
          device: the GPU.
          row_size: of the pages.
          converts: whether the kernel reads or writes codes as values, and does not only move them.
        """
        if jnp.dtype(self.storage_dtype).itemsize == 1 and row_size % WORD:
            return f"rows of {row_size} codes: it takes them by fours"
        return None

    def lacks_attention(self, device: Device, head_dim: int, q_dtype: DTypeLike) -> str | None:
        """What `paged_attention` lacks beyond that, as registers."""
        return None

    def lacks_mass(self) -> str | None:
        """What `attention_mass` lacks beyond that."""
        return None


@dataclass(frozen=True)
class Layout:
    """Where the elements of a head lie in a program's tiles.

    Attributes:
      head_dim: of a head.
      word: number of each element of a row that is loaded.
      dims: for each part, which elements of a head it holds.
      in_words, in_head: `[1, ..]`, which elements of a loaded row, and of a part, there are.
    """

    head_dim: int
    word: Array
    dims: list[Array]
    in_words: Array
    in_head: Array


def plain_layout(head_dim: int, parts: int = 1) -> Layout:
    """Part `n` holds the elements `n, n + parts...`"""
    word = lax.iota(jnp.int32, max(16, next_power_of_two(head_dim // parts)))
    exists = (word < head_dim // parts)[None, :]
    dims = [word * parts + part if parts > 1 else word for part in range(parts)]
    return Layout(head_dim, word, dims, exists, exists)
