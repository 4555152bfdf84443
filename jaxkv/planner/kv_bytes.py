"""Bytes of K and V."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from jaxkv.arguments import integer, real
from jaxkv.config import CacheConfig
from jaxkv.planner.shape import ModelShape
from jaxkv.sizing import pages_for_seqs, row_config
from pallas_kernels.formats import FORMATS

KV_BITS = {name: storage.bits for name, storage in FORMATS.items()}
SHORT = {storage.short: name for name, storage in FORMATS.items() if storage.short is not None}


@dataclass(frozen=True, slots=True)
class KVBytes:
    """K and V of all layers, in bytes.

    Attributes:
      exact: the elements of the tokens that each layer can still see, and nothing else.
      paged: the whole pages that hold these tokens, if each layer had pages of its own. It includes scales
        and `fragmentation`. No cache of pages this size takes less.
      reserved: the pool of `cache_config`, with `fragmentation`: what `init` allocates for K and V. Beyond
        `paged` it has the padding of groups (layers are divided into groups of equal size; the last group
        of a kind may have fewer) and the pages of one prefill chunk, which layers with a window need in
        addition. Without windows it equals `paged`. Where jaxkv has no cache (MLA, refused formats), every
        layer keeps the whole context.
      scales: scales of a quantized cache, in addition to `exact`.
    """

    exact: int
    paged: int
    reserved: int
    scales: int = 0


def kv_cache_bytes(
    shape: ModelShape,
    context: int,
    concurrency: int = 1,
    *,
    kv_dtype: str = "auto",
    page_size: int = 16,
    fragmentation: float = 1.0,
) -> KVBytes:
    """Bytes of K and V of `concurrency` sequences of `context` tokens.

    A token has `elements_per_token` elements per layer: 2 x KV heads x head_dim, or MLA's latent vector. A
    layer with a window keeps at most `window` tokens, which may begin in the middle of a page.

    Args:
      shape: the model.
      context: tokens per sequence.
      concurrency: sequences.
      kv_dtype: "auto" (the model's, or bfloat16 if unknown), float32, bfloat16, float16 (or f32, bf16,
        f16), fp8, int8 or int4.
      page_size: tokens per page.
      fragmentation: factor on the bytes of pages. The default 1.0 already counts whole pages; other planners
        assume 1.15.

    Raises:
      ValueError: for a value out of range or an unknown dtype.

    Example:
      >>> llama = ModelShape.from_config("llama-3.1-8b")
      >>> kv_cache_bytes(llama, 8192, kv_dtype="bfloat16").exact // 2**20
      1024
    """
    context = check_count("context", context)
    concurrency = check_count("concurrency", concurrency)
    page_size = check_count("page_size", page_size)
    factor = real(fragmentation)
    if factor is None or not 1 <= factor < 100:
        raise ValueError(f"fragmentation={fragmentation!r} must be a factor from 1 to 100")
    dtype = resolve_dtype(shape, kv_dtype)
    bits = [KV_BITS[dtype] * elements for elements in shape.layer_elements]
    scales = _scale_bytes(shape, dtype)

    def in_pages(windows: Iterable[int | None]) -> int:
        pages = (pages_of(context, window, page_size) for window in windows)
        one = sum(n * (of // 8 + scale) for n, of, scale in zip(pages, bits, scales, strict=True))
        return math.ceil(one * page_size * concurrency * factor)

    row = _row_config(shape, context, kv_dtype=dtype, page_size=page_size)
    if row is None:
        reserved = in_pages([None] * len(shape.windows))
    else:
        reserved = math.ceil(pages_for_seqs(row, context, concurrency) * row.page_bytes * factor)
    kept = [min(context, window or context) for window in shape.windows]
    return KVBytes(
        exact=sum(tokens * of for tokens, of in zip(kept, bits, strict=True)) * concurrency // 8,
        scales=sum(tokens * scale for tokens, scale in zip(kept, scales, strict=True)) * concurrency,
        paged=in_pages(shape.windows),
        reserved=reserved,
    )


def pages_of(context: int, window: int | None, page_size: int) -> int:
    """Most pages of one sequence in a layer; a window may begin and end within a page."""
    whole = -(-context // page_size)
    return whole if window is None else min(whole, (window + page_size - 2) // page_size + 1)


def cache_config(
    shape: ModelShape,
    context: int,
    concurrency: int,
    *,
    kv_dtype: str = "auto",
    page_size: int = 16,
) -> CacheConfig | None:
    """The cache for such sequences. Its layers with a window release their pages; see `KVBytes.reserved`.

    None if jaxkv cannot store it: MLA, or a `head_dim` that the format refuses, such as int4 with one that is
    not a multiple of 8.

    Args:
      shape, context, concurrency, kv_dtype, page_size: as for `kv_cache_bytes`.
    """
    row = _row_config(shape, context, concurrency, kv_dtype=kv_dtype, page_size=page_size)
    return None if row is None else replace(row, num_pages=pages_for_seqs(row, context, concurrency))


def pool_pages(
    shape: ModelShape, context: int, concurrency: int, *, kv_dtype: str = "auto", page_size: int = 16
) -> int:
    """Pages of `cache_config`'s pool, also for more sequences than a pool can hold.

    Args:
      shape, context, concurrency, kv_dtype, page_size: as for `kv_cache_bytes`.
    """
    row = _row_config(shape, context, kv_dtype=kv_dtype, page_size=page_size)
    if row is None:
        return pages_of(context, None, page_size) * concurrency
    return pages_for_seqs(row, context, concurrency)


@lru_cache(maxsize=1024)
def _row_config(
    shape: ModelShape, context: int, concurrency: int = 1, *, kv_dtype: str, page_size: int
) -> CacheConfig | None:
    """`cache_config` with the pages of one full row only."""
    dtype = resolve_dtype(shape, kv_dtype)
    if shape.is_latent or _refuses(shape, dtype):
        return None
    quantized = FORMATS[dtype].quantized
    return row_config(
        context,
        num_layers=shape.num_layers,
        **_heads(shape),
        layer_windows=shape.windows,
        page_size=page_size,
        max_seqs=concurrency,
        dtype=(shape.dtype or "bfloat16") if quantized else dtype,
        quantization=dtype if quantized else None,
    )


def _heads(shape: ModelShape) -> dict[str, object]:
    """KV heads and head_dim, as arguments of `CacheConfig`."""
    if shape.layer_sizes is None:
        return dict(num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim)
    heads, dims = zip(*shape.layer_sizes, strict=True)
    return dict(layer_kv_heads=heads, layer_head_dims=dims)


def resolve_dtype(shape: ModelShape, kv_dtype: str) -> str:
    """The full name of a `kv_dtype`; "auto" is the model's, or bfloat16 if unknown.

    Raises:
      ValueError: for an unknown name.
    """
    name = (shape.dtype or "bfloat16") if kv_dtype == "auto" else SHORT.get(str(kv_dtype), str(kv_dtype))
    if name not in KV_BITS:
        raise ValueError(f"kv_dtype={kv_dtype!r} is not known; known: auto, {', '.join([*SHORT, *KV_BITS])}")
    return name


def check_count(name: str, value: object) -> int:
    """The value as a Python integer.

    Raises:
      ValueError: if it is not a positive integer, naming it.
    """
    return integer(name, value)


def _scale_bytes(shape: ModelShape, dtype: str) -> list[int]:
    """Bytes of the scales of one token in each layer."""
    storage = FORMATS[dtype]
    if shape.is_latent or _refuses(shape, dtype):
        of_elements = {n: storage.vector_scale_bytes(n) for n in set(shape.layer_elements)}
        return [of_elements[n] for n in shape.layer_elements]
    if shape.layer_sizes is None:
        return [storage.scale_bytes(shape.num_kv_heads, shape.head_dim)] * len(shape.windows)
    return [storage.scale_bytes(heads, head_dim) for heads, head_dim in shape.layer_sizes]


def _refuses(shape: ModelShape, dtype: str) -> bool:
    """Whether the format has no storage for such heads."""
    dims = {shape.head_dim} if shape.layer_sizes is None else {dim for _, dim in shape.layer_sizes}
    return any(FORMATS[dtype].refuses(dim) for dim in dims)
