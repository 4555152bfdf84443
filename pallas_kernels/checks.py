"""Checks of arguments at trace time, shared by all operations."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from pallas_kernels import formats
from pallas_kernels.arguments import real, whole


@dataclass(frozen=True, eq=False, slots=True)
class Pool:
    """The arrays of a pool and their format.

    Attributes:
      storage: the format.
      pages: `[layers, pages, kv_heads, page_size, row]` of K and of V, or of K alone.
      scales: one array for each of these, if the format is quantized.
    """

    storage: formats.Format
    pages: tuple[Array, ...]
    scales: tuple[Array, ...]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Pages, then scales."""
        return self.pages + self.scales

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of the pages."""
        layers, pages, kv_heads, page_size, row = self.pages[0].shape
        return layers, pages, kv_heads, page_size, row

    @property
    def head_dim(self) -> int:
        """Elements per head."""
        return self.storage.head_dim(self.shape[4])


def check_pool(
    k_pages: Array,
    v_pages: Array,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
    kv_format: str | None = None,
) -> Pool:
    """Checks pages `[layers, pages, kv_heads, page_size, row]` of one dtype, and scales of codes."""
    keys = check_keys(k_pages, k_scales, kv_format)
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        raise ValueError(
            f"v_pages {v_pages.dtype}{list(v_pages.shape)} must match "
            f"k_pages {k_pages.dtype}{list(k_pages.shape)}"
        )
    _check_scales("v_scales", v_scales, v_pages, keys.storage, keys=False)
    scales = () if v_scales is None else (*keys.scales, v_scales)
    return Pool(keys.storage, (*keys.pages, v_pages), scales)


def check_keys(k_pages: Array, k_scales: Array | None, kv_format: str | None = None) -> Pool:
    """As `check_pool`, for K alone."""
    if k_pages.ndim != 5:
        raise ValueError(
            f"k_pages must be [layers, pages, kv_heads, page_size, head_dim], not {list(k_pages.shape)}"
        )
    storage = formats.of(k_pages.dtype, kv_format)
    if not all(k_pages.shape):
        raise ValueError(f"k_pages {list(k_pages.shape)} must not be empty")
    _check_scales("k_scales", k_scales, k_pages, storage, keys=True)
    return Pool(storage, (k_pages,), () if k_scales is None else (k_scales,))


def _check_scales(
    name: str, scales: Array | None, pages: Array, storage: formats.Format, *, keys: bool
) -> None:
    if not storage.quantized:
        if scales is not None:
            raise ValueError(f"pages of {pages.dtype} have no {name}")
        return
    if scales is None:
        raise ValueError(f"pages of {pages.dtype} need {name}")
    of_keys, of_values = storage.scale_shapes(pages.shape)
    shape, dtype = of_keys if keys else of_values, storage.scale_dtype
    # Of each page and head there may be more than there are token slots.
    fits = len(scales.shape) == len(shape) and scales.shape[3] >= shape[3]
    if not fits or scales.shape != (*shape[:3], scales.shape[3], *shape[4:]) or scales.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}{list(shape)}, not {scales.dtype}{list(scales.shape)}")


def as_int32(array: Array | np.ndarray) -> Array:
    """Converts to int32 without overflow: clips to its limits, which no slot, page or length reaches."""
    own, int32 = jnp.iinfo(array.dtype), jnp.iinfo(jnp.int32)
    return jnp.asarray(array.clip(max(own.min, int32.min), min(own.max, int32.max)), jnp.int32)


def check_floating(name: str, array: Array) -> None:
    """Refuses an array that is not floating point."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, not {array.dtype}")


def check_integers(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Refuses an array that is not of integers or not of exactly this shape."""
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape != shape:
        raise ValueError(f"{name} must be int32{list(shape)}, not {array.dtype}{list(array.shape)}")


def check_layer(layer: object, num_layers: int) -> None:
    """Refuses a layer out of range, unless it is a traced integer scalar, which kernels check."""
    if isinstance(layer, int) and not isinstance(layer, bool):
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer={layer} must be from 0 to {num_layers - 1}")
        return
    dtype, shape = getattr(layer, "dtype", None), getattr(layer, "shape", None)
    if dtype is None or shape != () or not jnp.issubdtype(dtype, jnp.integer):
        shown = dtype is not None or isinstance(layer, (float, str, bool, type(None)))
        found = f"{layer!r:.60}" if shown else f"a {type(layer).__name__}"
        raise ValueError(f"layer must be an integer scalar, not {found}")
    if not isinstance(layer, Tracer):
        check_layer(int(layer), num_layers)  # type: ignore[call-overload]


def as_layer(layer: int | Array) -> Int[Array, ""]:
    """The layer index as int32; an index that does not fit stays out of range."""
    return jnp.asarray(layer, jnp.int32) if isinstance(layer, int) else as_int32(jnp.asarray(layer))


def is_layer(layer: int | Array, num_layers: int) -> Bool[Array, ""]:
    """Whether a layer index, which may be traced, is in range."""
    layer = as_layer(layer)
    return (layer >= 0) & (layer < num_layers)


def check_queries(
    q: Array,
    pool: Pool,
    page_table: Array,
    table_rows: Array,
    kv_lengths: Array,
    query_starts: Array,
) -> None:
    """Checks queries of ragged sequences and the tables of these sequences."""
    check_floating("q", q)
    kv_heads, head_dim = pool.shape[2], pool.head_dim
    if q.ndim != 3 or q.shape[2] != head_dim:
        raise ValueError(f"q must be [tokens, q_heads, head_dim={head_dim}], not {list(q.shape)}")
    if q.shape[0] == 0 or q.shape[1] == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"q {list(q.shape)} must have tokens, and a multiple of {kv_heads} query heads")
    if page_table.ndim != 2:
        raise ValueError(f"page_table must be [rows, pages_per_seq], not {list(page_table.shape)}")
    if not all(page_table.shape):
        raise ValueError(f"page_table {list(page_table.shape)} must not be empty")
    if table_rows.ndim != 1:
        raise ValueError(f"table_rows must be [seqs], not {list(table_rows.shape)}")
    seqs = table_rows.shape[0]
    if seqs == 0:
        raise ValueError("table_rows must name a sequence")
    check_integers("page_table", page_table, page_table.shape)
    check_integers("table_rows", table_rows, (seqs,))
    check_integers("kv_lengths", kv_lengths, (seqs,))
    check_integers("query_starts", query_starts, (seqs + 1,))


class Options(NamedTuple):
    """Static options of attention, as Python numbers."""

    scale: float | None
    window: int | None
    sink_tokens: int
    softcap: float | None


def check_options(scale: object, window: object, sink_tokens: object, softcap: object) -> Options:
    """Checks and converts the options of attention.

    Raises:
      ValueError: for an invalid option, naming it; all are static.
    """
    for name, value in (("window", window), ("softcap", softcap), ("scale", scale)):
        number = real(value)
        if value is not None and (number is None or not 0 < number < float("inf")):
            raise ValueError(f"{name}={value!r} must be a positive Python number (it is static)")
        # Far beyond any model. Outside this range scores may overflow float32, and the softmax is NaN.
        if name != "window" and number is not None and not 1e-6 <= number <= 1e6:
            raise ValueError(f"{name}={value!r} must lie between 1e-6 and 1e6")
    if window is not None and whole(window) is None:
        raise ValueError(f"window={window!r} must be an integer")
    sinks = whole(sink_tokens)
    if sinks is None or sinks < 0:
        raise ValueError(f"sink_tokens={sink_tokens!r} must be a Python integer of at least 0 (it is static)")
    if sinks and window is None:
        raise ValueError(f"sink_tokens={sinks} needs a window: these tokens are attended to outside of it")
    return Options(
        scale=None if scale is None else real(scale),
        window=None if window is None else whole(window),
        sink_tokens=sinks,
        softcap=None if softcap is None else real(softcap),
    )
