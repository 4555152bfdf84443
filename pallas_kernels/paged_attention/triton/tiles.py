"""Loads tiles of K and V in Triton; the format converts their codes to values."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels.formats import Format
from pallas_kernels.paged_attention.triton import ptx
from pallas_kernels.paged_attention.triton.tuning import Tuning


def assembled(storage: Format, q_dtype, tuning: Tuning, interpret: bool) -> DTypeLike | None:
    """The dtype to which assembly converts words of codes; None without assembly."""
    has_assembly = not interpret and tuning.ptx and jnp.dtype(q_dtype).name in storage.assembly
    return q_dtype if has_assembly else None


def read_tile(at, mask, storage: Format, assembled: DTypeLike | None = None):
    """K or V of a tile, in parts: codes, or values of dtype `assembled` if that is not None."""
    tile = plgpu.load(at, mask=mask, other=jnp.zeros((), at.dtype))
    if assembled is not None and tile.dtype == jnp.int32:
        return tuple(ptx.values(tile, storage.assembly[jnp.dtype(assembled).name], assembled))
    return storage.unpack(tile)


def scale_loader(ref, tokens, mask) -> Callable:
    """`load()` returns one scale per token of a tile, `load(words)` these words of each; see `Format`.

    Args:
      ref: the scales.
      tokens: layer, page ids, head and offsets of the tokens.
      mask: which tokens exist.
    """
    layer, ids, head, offsets = tokens

    def load(words=None):
        if words is None:
            return plgpu.load(ref.at[tokens], mask=mask, other=0.0)
        at = layer, ids[:, None], head, offsets[:, None], words
        return plgpu.load(ref.at[at], mask=mask[:, None] & (words >= 0), other=jnp.zeros((), ref.dtype))

    return load
