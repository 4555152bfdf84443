"""Tiles of K and V in Triton, as they are loaded; what their codes stand for is the format's to say."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels.formats import Format
from pallas_kernels.paged_attention.triton import ptx
from pallas_kernels.paged_attention.triton.tuning import Tuning


def assembled(storage: Format, q_dtype, tuning: Tuning, interpret: bool) -> DTypeLike | None:
    """The dtype that words of codes become in assembly, or None."""
    there_is = not interpret and tuning.ptx and jnp.dtype(q_dtype).name in storage.assembly
    return q_dtype if there_is else None


def read_tile(at, mask, storage: Format, assembled: DTypeLike | None = None):
    """K or V of a tile, by parts: codes, or values, of the dtype `assembled` if there is one."""
    tile = plgpu.load(at, mask=mask, other=jnp.zeros((), at.dtype))
    if assembled is not None and tile.dtype == jnp.int32:
        return tuple(ptx.values(tile, storage.assembly[jnp.dtype(assembled).name], assembled))
    return storage.unpack(tile)


def scale_loader(ref, place, mask) -> Callable:
    """`load()` gives a scale for each token of a tile, `load(words)` some of each token's; see `Format`.

    Args:
      ref: the scales.
      place: layer, page ids, head and offsets of the tokens.
      mask: which of them there are.
    """
    layer, ids, head, offsets = place

    def load(words=None):
        if words is None:
            return plgpu.load(ref.at[place], mask=mask, other=0.0)
        at = layer, ids[:, None], head, offsets[:, None], words
        return plgpu.load(ref.at[at], mask=mask[:, None] & (words >= 0), other=jnp.zeros((), ref.dtype))

    return load
