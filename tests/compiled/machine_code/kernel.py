"""What is compiled: calls of the library, with shapes and requirements."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import formats
from pallas_kernels.device import Device
from pallas_kernels.paged_attention.triton.tuning import choose, choose_mass, choose_shared, lacks, lacks_mass
from pallas_kernels.sizes import next_power_of_two


@dataclass(frozen=True)
class Kernel:
    """A call to compile.

    Attributes:
      of: names of the launches that are looked at.
      requirements: what their machine code must meet, see `check_targets`.
      head_dim: of attention; else 0.
      lacks: what a device lacks for it, if anything.
      wide_loads: how many 16-byte loads there must be, at least.
    """

    name: str
    call: Callable
    shapes: tuple
    of: tuple[str, ...]
    requirements: frozenset[str]
    head_dim: int = 0
    quantized: bool = False
    lacks: Callable[[Device], str | None] = lambda _: None
    wide_loads: Callable[[Device], int] = lambda _: 1


def attention(
    name: str,
    *,
    q_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    q_dtype: str | None = None,
    page_size: int = 16,
    seqs: int = 64,
    tokens: int = 64,
    retuned: Mapping[str, int] = MappingProxyType({}),
    shared: bool = False,
    mass: bool = False,
    requirements: tuple[str, ...] = ("spills", "matrix", "wide loads"),
    **options,
) -> Kernel:
    """A call of `paged_attention` on a pool that takes 64-bit offsets, as large ones do: the launch for each
    sequence's own tokens, or that for the tokens they share."""
    storage = formats.of(dtype)
    pages = 2 ** (19 if storage.quantized else 17) // page_size
    pool = _pool(pages, kv_heads, page_size, head_dim, dtype)
    q = _shape((tokens, q_heads, head_dim), q_dtype or dtype)
    rows, vector = _shape((seqs, 8192 // page_size), "int32"), _shape((seqs,), "int32")

    def tuned(device, table=choose_shared if shared else choose_mass if mass else choose):
        shape: dict[str, Any] = dict(
            tokens=tokens, group=q_heads // kv_heads, head_dim=head_dim, storage=storage, q_dtype=q.dtype
        )
        return replace(table(device, seqs=seqs, **shape), **retuned)

    def call(device, *arrays):
        arrays, scales = arrays[:6], _scales_by_name(arrays[6:])
        tuning = {"tuning": tuned(device)}
        if mass:
            q, k, _, table, lengths, starts = arrays
            scales.pop("v_scales", None)
            arrays = q, k, table, lengths, starts, jnp.zeros(q.shape[:2])
            return pallas_kernels.attention_mass(*arrays, layer=7, **tuning, **scales, **options)
        if shared:
            tuning = {"tuning": tuned(device, choose), "shared_tuning": tuned(device)}
        return pallas_kernels.paged_attention(*arrays, layer=7, **tuning, **scales, **options)

    def wide_loads(device):
        """Of a tile of K and, but for the mass, one of V, by all threads together."""
        tuning, lanes = tuned(device), 64 if device.arch.startswith("gfx9") else 32
        tile = tuning.key_tile * next_power_of_two(pool.shape[-1]) * pool.dtype.itemsize
        return max(1, (1 if mass else 2) * tile // (16 * lanes * tuning.num_warps))

    return Kernel(
        name,
        call,
        (q, pool, pool, rows, vector, _shape((seqs + 1,), "int32"), *_scales(pool)),
        of=("paged_attention_shared" if shared else "paged_attention",),
        requirements=frozenset(requirements),
        head_dim=head_dim,
        quantized=storage.quantized,
        lacks=lambda device: (lacks_mass if mass else lacks)(device, q, storage),
        wide_loads=wide_loads,
    )


def mass(name: str, **options) -> Kernel:
    """A call of `attention_mass`, shaped like one of `attention`: a log-sum more a row, and no V."""
    whole = attention(name, mass=True, **options)
    # Log-sums of a tile of queries are few, and copied by fours as the scales of codes are.
    return replace(whole, of=("attention_mass",), quantized=True)


def merge(name: str, **options) -> Kernel:
    """The last launch of a decode step."""
    whole = attention(name, requirements=("spills",), **options)
    return Kernel(whole.name, whole.call, whole.shapes, ("paged_attention_merge",), whole.requirements)


def append(name: str, *, kv_heads: int, head_dim: int, dtype: str, pool_dtype: str) -> Kernel:
    """A call of `append_kv`."""
    pool = _pool(65536, kv_heads, 16, head_dim, pool_dtype)
    new, index = _shape((256, kv_heads, head_dim), dtype), _shape((256,), "int32")

    def call(_, *arrays):
        return pallas_kernels.append_kv(*arrays[:6], layer=7, **_scales_by_name(arrays[6:]))

    shapes = pool, pool, new, new, index, index, *_scales(pool)
    lacking = partial(_lacks_dtype, pool)
    return Kernel(name, call, shapes, ("append_kv",), frozenset({"spills"}), lacks=lacking)


def copy(name: str, *, dtype: str, page_size: int) -> Kernel:
    """A call of `copy_pages`."""
    pool = _pool(32768, 8, page_size, 128, dtype)

    def call(_, *arrays):
        return pallas_kernels.copy_pages(*arrays[:4], **_scales_by_name(arrays[4:]))

    shapes = pool, pool, _shape((64,), "int32"), _shape((64,), "int32"), *_scales(pool)
    return _mover("copy", name, call, shapes)


def move(name: str, *, dtype: str, page_size: int) -> Kernel:
    """A call of `move_pages`."""
    pool = _pool(32768, 8, page_size, 128, dtype)

    def call(_, *arrays):
        return pallas_kernels.move_pages(*arrays[:3], **_scales_by_name(arrays[3:]))

    shapes = pool, pool, _shape((32768,), "int32"), *_scales(pool)
    return _mover("move", name, call, shapes)


def _mover(verb: str, name: str, call: Callable, shapes: tuple) -> Kernel:
    lacking = partial(_lacks_dtype, shapes[0], converts=False)
    requirements = frozenset({"spills", "wide loads"})
    return Kernel(name, call, shapes, (f"{verb}_pages",), requirements, lacks=lacking)


def _lacks_dtype(pool, device: Device, *, converts: bool = True) -> str | None:
    return formats.of(pool.dtype).lacks(device, pool.shape[-1], converts=converts)


def _scales(pool) -> tuple:
    """Of K and V, if the pool is one of codes."""
    storage = formats.of(pool.dtype)
    return tuple(_shape(shape, storage.scale_dtype) for shape in storage.scale_shapes(pool.shape))


def _pool(pages, kv_heads, page_size, head_dim, dtype):
    return _shape((32, pages, kv_heads, page_size, formats.of(dtype).row_size(head_dim)), dtype)


def _scales_by_name(scales) -> dict:
    return dict(zip(("k_scales", "v_scales"), scales, strict=False))


def _shape(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)
