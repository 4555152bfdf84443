"""Attention over pages and the writes to them, in NumPy float64: what every backend is held to."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.reference import int4


def attention(q, k, v, **options):
    """Causal attention of one sequence; the queries are those of its last tokens.

    q [tokens, q_heads, head_dim], k and v [length, kv_heads, head_dim]
    -> out [tokens, q_heads, head_dim], lse [tokens, q_heads].
    """
    weights, lse = softmax(q, k, **options)
    v = np.repeat(v, q.shape[1] // v.shape[1], axis=1)
    return np.einsum("tqn,nqd->tqd", weights, v), lse


def softmax(q, k, *, scale=None, window=None, sink_tokens=0, softcap=None, sink_logits=None):
    """Its weights [tokens, q_heads, length], and lse."""
    sink_logits = None if sink_logits is None else np.asarray(sink_logits)
    tokens, q_heads, head_dim = q.shape
    length, kv_heads, _ = k.shape
    k = np.repeat(k, q_heads // kv_heads, axis=1)
    scores = np.einsum("tqd,nqd->tqn", q, k) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    query, key = np.arange(length - tokens, length)[:, None], np.arange(length)
    visible = key <= query
    if window is not None:
        visible &= (key > query - window) | (key < sink_tokens)
    scores = np.where(visible[:, None, :], scores, -np.inf)
    top = scores.max(axis=-1) if sink_logits is None else np.maximum(scores.max(axis=-1), sink_logits)
    total = np.exp(scores - top[..., None]).sum(axis=-1)
    if sink_logits is not None:
        total += np.exp(sink_logits - top)
    lse = top + np.log(total)
    return np.exp(scores - lse[..., None]), lse


def read_pages(pages, page_table_row, length):
    """The tokens [length, kv_heads, ...] of one sequence from one layer's pages."""
    _, kv_heads, page_size, *row = pages.shape
    ids = page_table_row[: -(-length // page_size)]
    return pages[ids].swapaxes(1, 2).reshape(-1, kv_heads, *row)[:length]


def read_tokens(arrays, layer, page_table_row, length):
    """Their values from one layer's pages and, of codes, scales, which may have more slots a page."""
    page_size = arrays[0].shape[3]
    return dequantize(
        *(read_pages(array[layer][:, :, :page_size], page_table_row, length) for array in arrays)
    )


def paged_attention(
    q,
    k_pages,
    v_pages,
    page_table,
    kv_lengths,
    query_starts,
    *,
    layer=0,
    k_scales=None,
    v_scales=None,
    shared_prefix=None,
    **options,
):
    """(out, lse) for every row of q; rows of no sequence are zero, with lse -inf. A shared prefix
    changes nothing."""
    q = q.astype(np.float64)
    pool = [(pages,) if scales is None else (pages, scales)
            for pages, scales in ((k_pages, k_scales), (v_pages, v_scales))]  # fmt: skip
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for row, length in enumerate(kv_lengths):
        rows = slice(query_starts[row], query_starts[row + 1])
        if length > 0 and rows.start < rows.stop:
            k, v = (read_tokens(arrays, layer, page_table[row], length) for arrays in pool)
            out[rows], lse[rows] = attention(q[rows], k, v, **options)
    return out, lse


def attention_mass(
    q,
    k_pages,
    page_table,
    kv_lengths,
    query_starts,
    *,
    layer=0,
    k_scales=None,
    v_scales=None,
    shared_prefix=None,
    **options,
):
    """The weights that each token received from its sequence's queries, summed over a KV head's group."""
    q, arrays = q.astype(np.float64), (k_pages,) if k_scales is None else (k_pages, k_scales)
    kv_heads, page_size = k_pages.shape[2:4]
    mass = np.zeros((len(kv_lengths), kv_heads, page_table.shape[1] * page_size))
    for row, length in enumerate(kv_lengths):
        rows = slice(query_starts[row], query_starts[row + 1])
        if length > 0 and rows.start < rows.stop:
            k = read_tokens(arrays, layer, page_table[row], length)
            weights, _ = softmax(q[rows], k, **options)
            grouped = weights.reshape(len(weights), kv_heads, -1, length)
            mass[row, :, :length] = grouped.sum(axis=(0, 2))
    return mass


def append_kv(k_pages, v_pages, k, v, page_ids, offsets, *, layer=0, k_scales=None, v_scales=None):
    pool, new = [k_pages, v_pages], [k, v]
    if k_scales is not None:
        pool += [k_scales, v_scales]
        new = encode(k, v, k_pages.dtype)
    pool = [array.copy() for array in pool]
    for row, (page, offset) in enumerate(zip(page_ids, offsets, strict=True)):
        if page < k_pages.shape[1]:
            for array, values in zip(pool, new, strict=True):
                array[layer, page, :, offset] = values[row]
    return tuple(pool)


def encode(k, v, dtype):
    """Codes of K and of V, and the scales of each."""
    if dtype == np.int32:
        (k, k_scale), (v, v_scale) = (int4.quantize(x, keys=x is k) for x in (k, v))
    else:
        (k, k_scale), (v, v_scale) = (quantize(x, dtype) for x in (k, v))
    return k, v, k_scale, v_scale


def quantize(values, dtype):
    """Codes and scales: a row's largest finite magnitude becomes the largest code; of fp8, the scale within
    an octave of that, in quarters, whose squared error is least."""
    end = 0.9 * float(jnp.finfo(np.asarray(values).dtype).max)
    values, dtype, one = np.asarray(values).astype(np.float32), jnp.dtype(dtype), np.float32(1)
    largest = np.float32(127 if dtype == jnp.int8 else 448)
    e4m3fn = jnp.float8_e4m3fn
    magnitude = np.where(np.isfinite(values), np.abs(values), 0)
    most = magnitude.max(axis=-1, keepdims=True, initial=0)
    most = np.where(most > 1e-30, most, np.float32(0))
    inverse = np.divide(largest, most, out=np.zeros_like(most), where=most > 0)
    values = np.clip(np.where(np.isnan(values), 0, values), -most, most)
    if dtype == jnp.int8:
        return np.round(values * inverse).astype(dtype), (most * (one / largest))[..., 0]
    factors, errors = np.array([1, 2**0.25, 2**0.5, 2**0.75]), []
    for factor in factors:
        scaled = values * (inverse * np.float32(1 / factor))
        error = scaled - scaled.astype(e4m3fn).astype(np.float32)
        squares = error * error * np.float32(1024 * factor * factor)
        errors.append(squares.astype(np.int32).sum(axis=-1))
    factor = factors.astype(np.float32)[np.argmin(errors, axis=0)][..., None]
    # No scale may stand for more than the dtype holds.
    factor = np.where(most.astype(np.float64) < end, factor, one)
    codes = (values * (inverse * (one / factor))).astype(e4m3fn)
    return codes.view(dtype), (most * (one / largest) * factor)[..., 0]


def unscaled(codes):
    """The values of codes, before their scale; any other array as it is."""
    return codes.view(jnp.float8_e4m3fn) if codes.dtype == np.uint8 else codes


def dequantize(codes, scales=None):
    if codes.dtype == np.int32:
        return int4.dequantize(codes, scales)
    values = unscaled(codes).astype(np.float64)
    return values if scales is None else values * scales[..., None]


def move_pages(k_pages, v_pages, targets, *, k_scales=None, v_scales=None):
    """A page that nothing moves to stays as it was."""
    live = [page for page, target in enumerate(targets) if 0 <= target < len(targets)]
    pool = [array for array in (k_pages, v_pages, k_scales, v_scales) if array is not None]
    moved = tuple(array.copy() for array in pool)
    for new, old in zip(moved, pool, strict=True):
        new[:, targets[live]] = old[:, live]
    return moved


def copy_pages(k_pages, v_pages, sources, destinations, *, k_scales=None, v_scales=None):
    pool = [array for array in (k_pages, v_pages, k_scales, v_scales) if array is not None]
    pool = tuple(array.copy() for array in pool)
    for source, destination in zip(sources, destinations, strict=True):
        if destination < k_pages.shape[1]:
            for array in pool:
                array[:, destination] = array[:, source]
    return pool
