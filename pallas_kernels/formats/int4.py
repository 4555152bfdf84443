"""K and V in four bits per element: words of eight codes, and words of scales; see `rotated_codes`.

Attention works on rotated rows: queries are rotated before it, and its output is rotated back. The outliers
of keys are not rotated; they are a second part of a tile, multiplied by the unrotated queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.formats import rotated_codes
from pallas_kernels.formats.base import Format, Layout
from pallas_kernels.formats.rotated_codes import BITS, CODES, num_groups, num_scale_words
from pallas_kernels.sizes import next_power_of_two

if TYPE_CHECKING:
    from pallas_kernels.device import Device
    from pallas_kernels.paged_attention.triton.tuning import Tuning

# Most elements per head; beyond it the index of an outlier does not fit its bits.
_MOST = 512
# For vectors, as in common quantizers: a 16-bit scale and an 8-bit zero point per 32 elements.
_VECTOR_GROUP, _VECTOR_GROUP_BYTES = 32, 3


class Int4(Format):
    """See `rotated_codes`."""

    name = "int4"
    storage_dtype = "int32"
    bits = BITS
    quantized = True
    scale_dtype = "int32"
    # Steps and outliers of a tile take as many registers as its values.
    max_rows = 16

    def row_size(self, head_dim: int) -> int:
        return head_dim // CODES

    def head_dim(self, row_size: int) -> int:
        return row_size * CODES

    def scale_shapes(self, pages: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        head_dim = self.head_dim(pages[-1])
        return tuple((*pages[:-1], num_scale_words(head_dim, keys=keys)) for keys in (True, False))

    def vector_scale_bytes(self, elements: int) -> int:
        return -(-elements // _VECTOR_GROUP) * _VECTOR_GROUP_BYTES

    def refuses(self, head_dim: int) -> str | None:
        return (
            None if head_dim % CODES == 0 and head_dim <= _MOST else f"a multiple of {CODES}, at most {_MOST}"
        )

    def encode(self, values: Array, *, keys: bool) -> tuple[Array, Array]:
        return rotated_codes.quantize(values, keys=keys)

    def decode(self, codes: Array, scales: Array | None, dtype: DTypeLike) -> Array:
        assert scales is not None
        # A row near the largest value of a 16-bit dtype may decode to values above it.
        most = float(jnp.finfo(dtype).max)
        return jnp.clip(rotated_codes.dequantize(codes, scales), -most, most).astype(dtype)

    def queries(self, q: Array) -> tuple[Array, ...]:
        return rotated_codes.rotate_queries(q), q

    def outputs(self, out: Array, dtype: DTypeLike) -> Array:
        return rotated_codes.rotate_queries(out).astype(dtype)

    @property
    def widened_dtype(self) -> DTypeLike:
        return jnp.int32

    def widen(self, codes: Array) -> Array:
        return codes

    def widened_values(self, codes: Array, scales: Array | None) -> tuple[Array, None]:
        assert scales is not None
        return jnp.concatenate(rotated_codes.dequantize_rotated(codes, scales), axis=-1), None

    def rows(self, k: Array, v: Array) -> tuple[Array, ...]:
        return self.encode_pair(k, v)

    def layout(self, head_dim: int, parts: int) -> Layout:
        """One part: the first code of all words, then the second of all words, and so on."""
        del parts
        run = head_dim // CODES
        word = lax.iota(jnp.int32, max(2, next_power_of_two(run)))
        width = np.int32(word.shape[0])
        index = lax.iota(jnp.int32, CODES * word.shape[0])
        in_run = lax.rem(index, width)
        dims = [lax.div(index, width) * run + in_run]
        return Layout(head_dim, word, dims, (word < run)[None, :], (in_run < run)[None, :])

    def load_scales(
        self, load: Callable[..., Array], tokens: int, head_dim: int, *, keys: bool
    ) -> list[Array]:
        """The words of steps, and of outliers, for each code of a word, `[tokens, codes, 1]`."""
        pairs, words = num_groups(head_dim) // 2, []
        for first in range(0, num_scale_words(head_dim, keys=keys), pairs):
            pair = load(first + lax.iota(jnp.int32, pairs)[None, :])
            pair = jnp.broadcast_to(pair[:, :, None], (tokens, pairs, CODES // pairs))
            words.append(pair.reshape(tokens, CODES, 1))
        return words

    def tile_values(
        self, parts: tuple[Array, ...], scales: list[Array], layout: Layout
    ) -> tuple[tuple[Array, ...], None]:
        """The values of the codes, and for keys the outliers: tiles as wide as a head."""
        (tile,), (steps, *outliers) = parts, scales
        tokens, groups = tile.shape[0], num_groups(layout.head_dim)
        part = lax.iota(jnp.int32, CODES)[None, :, None]
        group = (part * groups) >> 3
        codes = ((tile[:, None, :] >> (BITS * part)) & 0xF).astype(jnp.float32)
        step, zero = rotated_codes.step_of(steps, group & 1)
        values = ((codes - 0.5 * zero.astype(jnp.float32)) * step).reshape(tokens, -1)
        if not outliers:
            return (values,), None
        index, value = rotated_codes.outlier_of(outliers[0], group & 1)
        in_group = part * (layout.head_dim // CODES) - group * (layout.head_dim // groups)
        here = (in_group + layout.word[None, None, :] == index) & layout.in_words[:, None, :]
        return (values, jnp.where(here, value, 0.0).reshape(tokens, -1)), None

    def tuned(self, tuning: Tuning, device: Device, head_dim: int, row_bytes: int) -> Tuning:
        """The largest tuning found that spills no registers."""
        if device.platform == "rocm":
            if not device.arch.startswith("gfx9"):
                return tuning
            num_warps = 4 if device.arch == "gfx942" and row_bytes == 256 else 2
            num_warps = 1 if row_bytes <= 128 else num_warps
            return replace(tuning, key_tile=_key_tile(2 * num_warps, head_dim), num_warps=num_warps)
        num_warps = 8 if row_bytes == 256 and 90 <= int(device.arch[3:]) < 120 else 4
        # As many stages as leave registers for addresses; 40 KB are in flight.
        num_stages = 7 if num_warps == 8 else 8
        key_tile = _key_tile(num_warps, head_dim)
        return replace(
            tuning, key_tile=key_tile, num_warps=num_warps, num_stages=num_stages, codes_a_word=4, ptx=False
        )

    def lacks_attention(self, device: Device, head_dim: int, q_dtype: DTypeLike) -> str | None:
        """Registers, where the machine code was found to spill."""
        reason, most = None, _most_head_dim(device)
        if q_dtype == jnp.float32:
            reason = "with float32 queries"
        elif most is not None and head_dim > most:
            reason = f"of head_dim {head_dim} on {device.arch}: {most} is the most"
        elif device.arch == "gfx942" and head_dim <= 64 and q_dtype == jnp.float16:
            reason = f"with float16 queries of head_dim {head_dim} on {device.arch}"
        return reason and f"registers for four-bit codes {reason}"

    def lacks_mass(self) -> str | None:
        return "four-bit keys for attention_mass"


def _key_tile(num_warps: int, head_dim: int) -> int:
    """Tokens whose keys take sixteen bytes per thread, in warps of 32."""
    return max(16, 1024 * num_warps // next_power_of_two(head_dim))


def _most_head_dim(device: Device) -> int | None:
    if device.platform == "rocm":
        return None if device.arch.startswith("gfx9") else 64
    return None if 90 <= int(device.arch[3:]) < 120 else 64


FORMATS = (Int4(),)
