"""K and V in four bits an element: words of eight codes and, beside them, words: see `rotated_codes`.

Attention reads rows rotated: queries are rotated before it, and its output is rotated back. The spikes of
keys are not rotated; they are a second part of a tile, for the queries as they came.
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

# Elements of a head, beyond which the place of a spike has no room.
_MOST = 512
# What other quantizers of vectors take: a 16-bit scale and an 8-bit zero point for 32 elements.
_VECTOR_GROUP, _VECTOR_GROUP_BYTES = 32, 3


class Int4(Format):
    """See `rotated_codes`."""

    name = "int4"
    storage_dtype = "int32"
    bits = BITS
    quantized = True
    scale_dtype = "int32"
    # Steps, places and spikes of a tile take as many registers as its values.
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
        # A row near the largest value of a dtype of 16 bits may come back above it.
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
        """One part: of all words the first code, then of all the second."""
        del parts
        run = head_dim // CODES
        word = lax.iota(jnp.int32, max(2, next_power_of_two(run)))
        width = np.int32(word.shape[0])
        number = lax.iota(jnp.int32, CODES * word.shape[0])
        of_part = lax.rem(number, width)
        dims = [lax.div(number, width) * run + of_part]
        return Layout(head_dim, word, dims, (word < run)[None, :], (of_part < run)[None, :])

    def load_scales(
        self, load: Callable[..., Array], tokens: int, head_dim: int, *, keys: bool
    ) -> list[Array]:
        """The words of steps, and of spikes, that each code of a word needs, `[tokens, codes, 1]`."""
        pairs, words = num_groups(head_dim) // 2, []
        for first in range(0, num_scale_words(head_dim, keys=keys), pairs):
            pair = load(first + lax.iota(jnp.int32, pairs)[None, :])
            pair = jnp.broadcast_to(pair[:, :, None], (tokens, pairs, CODES // pairs))
            words.append(pair.reshape(tokens, CODES, 1))
        return words

    def tile_values(
        self, parts: tuple[Array, ...], scales: list[Array], layout: Layout
    ) -> tuple[tuple[Array, ...], None]:
        """What codes stand for, and behind keys their spikes: tiles as wide as a head."""
        (tile,), (steps, *spikes) = parts, scales
        tokens, groups = tile.shape[0], num_groups(layout.head_dim)
        part = lax.iota(jnp.int32, CODES)[None, :, None]
        group = (part * groups) >> 3
        codes = ((tile[:, None, :] >> (BITS * part)) & 0xF).astype(jnp.float32)
        step, zero = rotated_codes.step_of(steps, group & 1)
        values = ((codes - 0.5 * zero.astype(jnp.float32)) * step).reshape(tokens, -1)
        if not spikes:
            return (values,), None
        place, value = rotated_codes.spike_of(spikes[0], group & 1)
        in_group = part * (layout.head_dim // CODES) - group * (layout.head_dim // groups)
        here = (in_group + layout.word[None, None, :] == place) & layout.in_words[:, None, :]
        return (values, jnp.where(here, value, 0.0).reshape(tokens, -1)), None

    def tuned(self, tuning: Tuning, device: Device, head_dim: int, row_bytes: int) -> Tuning:
        """As found to spill no registers."""
        if device.platform == "rocm":
            if not device.arch.startswith("gfx9"):
                return tuning
            num_warps = 4 if device.arch == "gfx942" and row_bytes == 256 else 2
            num_warps = 1 if row_bytes <= 128 else num_warps
            return replace(tuning, key_tile=_key_tile(2 * num_warps, head_dim), num_warps=num_warps)
        num_warps = 8 if row_bytes == 256 and 90 <= int(device.arch[3:]) < 120 else 4
        # As many stages as leave registers for addresses: 40 KB are under way.
        num_stages = 7 if num_warps == 8 else 8
        key_tile = _key_tile(num_warps, head_dim)
        return replace(
            tuning, key_tile=key_tile, num_warps=num_warps, num_stages=num_stages, codes_a_word=4, ptx=False
        )

    def lacks_attention(self, device: Device, head_dim: int, q_dtype: DTypeLike) -> str | None:
        """Where machine code was found to spill."""
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
    """Tokens whose keys are sixteen bytes for each thread, of warps of 32."""
    return max(16, 1024 * num_warps // next_power_of_two(head_dim))


def _most_head_dim(device: Device) -> int | None:
    if device.platform == "rocm":
        return None if device.arch.startswith("gfx9") else 64
    return None if 90 <= int(device.arch[3:]) < 120 else 64


FORMATS = (Int4(),)
