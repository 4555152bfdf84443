"""Storage formats of K and V in a pool.

A format is one object in one file of this folder, and one line of `_FILES`. No other code asks which format a
pool has: formats differ only in the methods and fields of `base.Format`. These use them:

    configs, planner        `name`, `bits`, `row_size`, `scale_shapes`, `token_bytes`, `refuses`
    checks of arguments     `storage_dtype`, `scale_shapes`, `scale_dtype`
    append, gather          `encode`, `decode`; in Triton `rows`, `write_view`, `encode_in_kernel`
    copy and move           nothing; they move memory
    attention in XLA        `queries`, `outputs`, `widen`, `widened_values`
    attention in Triton     `queries`, `outputs`, `parts`, `read_view`, `layout`, then for each tile `unpack`
                            (or `assembly`), `load_scales`, `tile_values`; `tuned` and `lacks` by device

A pool has an array of pages for K and one for V, and with a quantized format an array of scales for each. The
functions of `pallas_kernels` take arrays; the dtype of the pages determines the format, the first in the
order below, unless `kv_format` names another.
"""

from importlib import import_module

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.formats.base import Format as Format

_FILES = (
    "floats",
    "int8",
    "fp8",
    "int4",
)
_MODULES = [import_module(f"{__name__}.{file}") for file in _FILES]
# By name, for configs and commands.
FORMATS: dict[str, Format] = {one.name: one for module in _MODULES for one in module.FORMATS}
# Also accepted as arrays, though no config makes them.
_READABLE = [*FORMATS.values(), *(one for module in _MODULES for one in getattr(module, "ALSO_READ", ()))]


def of(dtype: DTypeLike, name: str | None = None) -> Format:
    """The format of pages of this dtype.

    Args:
      dtype: of the pages.
      name: of the format, if several have pages of this dtype. Default: the first.

    Raises:
      ValueError: for a dtype that no format stores, or that the named format does not store.

    Example:
      >>> of("int8").name, of("uint8").name
      ('int8', 'fp8')
    """
    dtype = jnp.dtype(dtype)
    for one in _READABLE:
        if dtype == one.storage_dtype and name in (None, one.name):
            return one
    if name is not None:
        known = named(name)
        raise ValueError(f"pages of {name} are {known.storage_dtype}, not {dtype}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"k_pages must be floating point, not {dtype}")
    codes = ", ".join(f"{one.storage_dtype} ({one.name})" for one in FORMATS.values() if one.quantized)
    raise ValueError(f"k_pages of {dtype} are not supported; supported codes: {codes}")


def named(name: str) -> Format:
    """The format of this name.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is not known; known: {', '.join(FORMATS)}")
    return FORMATS[name]
