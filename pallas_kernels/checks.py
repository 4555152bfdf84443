"""Checks of arguments, at trace time, that every operation shares."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from pallas_kernels.quantization import is_quantized, scale_dtype, scale_shapes


def check_pool(
    k_pages: Array, v_pages: Array, k_scales: Array | None = None, v_scales: Array | None = None
) -> None:
    """Pages `[layers, pages, kv_heads, page_size, row]` of one dtype, and scales if these are codes."""
    if k_pages.ndim != 5:
        raise ValueError(
            f"k_pages must be [layers, pages, kv_heads, page_size, head_dim], not {list(k_pages.shape)}"
        )
    quantized = is_quantized(k_pages.dtype)
    if not quantized:
        check_floating("k_pages", k_pages)
        if k_pages.dtype.itemsize == 1:
            raise ValueError(f"k_pages of {k_pages.dtype} are not served; codes: int8, uint8 (E4M3FN), int32")
    if not all(k_pages.shape):
        raise ValueError(f"k_pages {list(k_pages.shape)} must not be empty")
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        raise ValueError(
            f"v_pages {v_pages.dtype}{list(v_pages.shape)} must match "
            f"k_pages {k_pages.dtype}{list(k_pages.shape)}"
        )
    shapes, dtype = scale_shapes(k_pages.shape, k_pages.dtype) or ((), ()), scale_dtype(k_pages.dtype)
    for name, scales, shape in zip(("k_scales", "v_scales"), (k_scales, v_scales), shapes, strict=True):
        if scales is None and quantized:
            raise ValueError(f"pages of {k_pages.dtype} need {name}")
        if scales is not None and not quantized:
            raise ValueError(f"pages of {k_pages.dtype} have no {name}")
        if scales is not None and (scales.shape != shape or scales.dtype != dtype):
            raise ValueError(f"{name} must be {dtype}{list(shape)}, not {scales.dtype}{list(scales.shape)}")


def pool_arrays(
    k_pages: Array, v_pages: Array, k_scales: Array | None, v_scales: Array | None
) -> tuple[Array, ...]:
    """`(k_pages, v_pages)`, and the scales of a pool of codes."""
    pages = k_pages, v_pages
    return pages if k_scales is None or v_scales is None else (*pages, k_scales, v_scales)


def as_int32(array: Array | np.ndarray) -> Array:
    """Numbers beyond int32 become its ends, which no slot, page and length reaches; they must not wrap."""
    own, int32 = jnp.iinfo(array.dtype), jnp.iinfo(jnp.int32)
    return jnp.asarray(array.clip(max(own.min, int32.min), min(own.max, int32.max)), jnp.int32)


def check_floating(name: str, array: Array) -> None:
    """A floating-point array."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, not {array.dtype}")


def check_integers(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """An integer array of exactly this shape."""
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape != shape:
        raise ValueError(f"{name} must be int32{list(shape)}, not {array.dtype}{list(array.shape)}")


def check_layer(layer: object, num_layers: int) -> None:
    """A Python int within the pool, or a traced integer scalar (which is trusted)."""
    if isinstance(layer, int) and not isinstance(layer, bool):
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer={layer} must be from 0 to {num_layers - 1}")
        return
    dtype, shape = getattr(layer, "dtype", None), getattr(layer, "shape", None)
    if dtype is None or shape != () or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"layer={layer!r} must be an integer scalar")
    if not isinstance(layer, Tracer):
        check_layer(int(layer), num_layers)  # type: ignore[call-overload]
