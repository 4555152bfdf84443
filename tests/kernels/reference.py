"""Attention over pages and the writes to them, in NumPy float64: what every backend is held to."""

import numpy as np


def attention(q, k, v, *, scale=None, window=None, softcap=None, sinks=None):
    """Causal attention of one sequence, whose last places the queries are.

    q [tokens, q_heads, head_dim], k and v [length, kv_heads, head_dim]
    -> out [tokens, q_heads, head_dim], lse [tokens, q_heads].
    """
    tokens, q_heads, head_dim = q.shape
    length, kv_heads, _ = k.shape
    k, v = (np.repeat(x, q_heads // kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("tqd,nqd->tqn", q, k) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    place, seen = np.arange(length - tokens, length)[:, None], np.arange(length)
    visible = seen <= place
    if window is not None:
        visible &= seen > place - window
    scores = np.where(visible[:, None, :], scores, -np.inf)
    top = scores.max(axis=-1) if sinks is None else np.maximum(scores.max(axis=-1), sinks)
    total = np.exp(scores - top[..., None]).sum(axis=-1)
    if sinks is not None:
        total += np.exp(sinks - top)
    lse = top + np.log(total)
    return np.einsum("tqn,nqd->tqd", np.exp(scores - lse[..., None]), v), lse


def read_pages(pages, page_table_row, length):
    """The tokens [length, kv_heads, head_dim] of one sequence from one layer's pages."""
    _, kv_heads, page_size, head_dim = pages.shape
    ids = page_table_row[: -(-length // page_size)]
    return pages[ids].swapaxes(1, 2).reshape(-1, kv_heads, head_dim)[:length]


def paged_attention(q, k_pages, v_pages, page_table, kv_lengths, query_starts, *, layer=0, **options):
    """(out, lse) for every row of q; rows of no sequence are zero, with lse -inf."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for row, length in enumerate(kv_lengths):
        rows = slice(query_starts[row], query_starts[row + 1])
        if length > 0 and rows.start < rows.stop:
            k, v = (read_pages(pages[layer], page_table[row], length) for pages in (k_pages, v_pages))
            out[rows], lse[rows] = attention(q[rows], k, v, **options)
    return out, lse


def append_kv(k_pages, v_pages, k, v, page_ids, offsets, *, layer=0):
    k_pages, v_pages = k_pages.copy(), v_pages.copy()
    for row, (page, offset) in enumerate(zip(page_ids, offsets, strict=True)):
        if page < k_pages.shape[1]:
            k_pages[layer, page, :, offset] = k[row]
            v_pages[layer, page, :, offset] = v[row]
    return k_pages, v_pages


def move_pages(k_pages, v_pages, targets):
    """What is left where nothing came to is as it was."""
    live = [page for page, target in enumerate(targets) if 0 <= target < len(targets)]
    moved = k_pages.copy(), v_pages.copy()
    for new, old in zip(moved, (k_pages, v_pages), strict=True):
        new[:, targets[live]] = old[:, live]
    return moved


def copy_pages(k_pages, v_pages, sources, destinations):
    k_pages, v_pages = k_pages.copy(), v_pages.copy()
    for source, destination in zip(sources, destinations, strict=True):
        if destination < k_pages.shape[1]:
            k_pages[:, destination] = k_pages[:, source]
            v_pages[:, destination] = v_pages[:, source]
    return k_pages, v_pages
