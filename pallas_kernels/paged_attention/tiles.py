"""Tiles of K and V in Triton, as they are loaded and what their codes stand for.

Codes of a byte are read as words of four, sixteen bytes at a time: the numbers 0, 4, 8... of a row, which are
the lowest bytes of its words, make one product, the numbers 1, 5, 9... the next. Words of eight
become a tile of numbers before it is multiplied, and the spikes of keys another, for queries as they came.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import int4
from pallas_kernels.paged_attention import ptx
from pallas_kernels.paged_attention.rows import Rows
from pallas_kernels.paged_attention.tuning import Tuning
from pallas_kernels.quantization import WORD, as_float8, as_words, is_int4, is_quantized


def how_read(pages, tuning: Tuning) -> tuple[int, Callable]:
    """In how many parts a row comes (see `Rows`), and what makes the array to be read of the pool's."""
    if not is_quantized(pages.dtype) or is_int4(pages.dtype):
        return 1, as_float8
    # So many codes Pallas does not address one by one: see `as_words`.
    words = WORD if 2**31 < pages.size <= 2**32 else tuning.codes_a_word
    return words, as_words if words > 1 else as_float8


def assembled(codes, q_dtype, tuning: Tuning, interpret: bool):
    """The dtype that words of codes become in assembly, or None."""
    if codes is None or interpret or not tuning.ptx:
        return None
    return q_dtype if ptx.converts(codes, q_dtype) else None


def read_tile(at, mask, codes, assembled=None):
    """K or V of a tile, by parts: codes, or numbers, of the dtype `assembled` if there is one."""
    tile = plgpu.load(at, mask=mask, other=jnp.zeros((), at.dtype))
    if assembled is not None and tile.dtype == jnp.int32:
        return ptx.numbers(tile, codes, assembled)
    return _unpack(tile, codes)


def _unpack(tile, codes):
    """A tile as it was loaded, by parts: a tile of words holds four codes in each."""
    if tile.dtype != jnp.int32 or is_int4(codes):
        return (tile,)
    if codes == jnp.int8:
        return tuple((tile << (24 - 8 * part)) >> 24 for part in range(WORD))
    bits = (((tile >> (8 * part)) & 0xFF).astype(jnp.uint8) for part in range(WORD))
    return tuple(lax.bitcast_convert_type(part, jnp.float8_e4m3fn) for part in bits)


def load_words(ref, at, mask, groups: int) -> list:
    """Of each token of a tile the words of steps, and of spikes, that each of its codes needs."""
    zero = jnp.zeros((), ref.dtype)
    (layer, ids, head, offsets), tokens, pairs = at, mask.shape[0], groups // 2
    words = []
    for first in range(0, ref.shape[-1], pairs):
        word = first + lax.iota(jnp.int32, pairs)[None, :]
        at = layer, ids[:, None], head, offsets[:, None], word
        pair = plgpu.load(ref.at[at], mask=mask[:, None] & (word >= 0), other=zero)
        pair = jnp.broadcast_to(pair[:, :, None], (tokens, pairs, int4.CODES // pairs))
        words.append(pair.reshape(tokens, int4.CODES, 1))
    return words


def numbers_of(tile, words, mine: Rows):
    """What four-bit codes stand for, and behind keys their spikes: tiles as wide as a head."""
    tokens, (steps, *spikes) = tile.shape[0], words
    part = lax.iota(jnp.int32, int4.CODES)[None, :, None]
    group = (part * mine.groups) >> 3
    codes = ((tile[:, None, :] >> (int4.BITS * part)) & 0xF).astype(jnp.float32)
    step, zero = int4.step_of(steps, group & 1)
    numbers = ((codes - 0.5 * zero.astype(jnp.float32)) * step).reshape(tokens, -1)
    if not spikes:
        return (numbers,)
    place, value = int4.spike_of(spikes[0], group & 1)
    in_group = part * (mine.head_dim // int4.CODES) - group * (mine.head_dim // mine.groups)
    here = (in_group + mine.word[None, None, :] == place) & mine.in_words[:, None, :]
    return numbers, jnp.where(here, value, 0.0).reshape(tokens, -1)
