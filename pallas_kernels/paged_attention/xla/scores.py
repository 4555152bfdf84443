"""Scores of a tile of queries and a tile of keys, and the sums of values that they weigh."""

from functools import partial

import jax.numpy as jnp

from pallas_kernels.paged_attention.masks import sees

# Up to this many rows the product of queries and keys transposes the queries, otherwise the keys.
_FEW_ROWS = 4


def side_by_side(queries):
    """The queries of a format concatenated to `[tokens, q_heads, widths]`, as the keys of `KeyTiles.read`."""
    q, *more = queries
    return jnp.concatenate([q, *(other.astype(q.dtype) for other in more)], axis=-1) if more else q


def see(row_indices, indices, *, window: int | None, sink_tokens: int):
    """The mask `[rows, size]`. An index of -1 is padding: not attended to, and attends to nothing."""
    return (indices >= 0)[None, :] & sees(
        row_indices[:, None], indices[None, :], window=window, sink_tokens=sink_tokens
    )


def score(q_tile, k, k_scale, visible, *, softcap: float | None):
    """Scores `[kv_heads, rows, size]` of a tile from `KeyTiles.read`; undefined where not visible."""
    scores = _products(q_tile, k, visible)
    if k_scale is not None:
        scores = scores * k_scale.swapaxes(1, 2)
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _products(q_tile, k, visible):
    """`[kv_heads, rows, size]`, zero where a key is not visible."""
    if q_tile.shape[1] > _FEW_ROWS:
        return jnp.where(visible[None], jnp.einsum("hrd,htd->hrt", q_tile, k, precision="highest"), 0.0)
    # Masked before the transpose: XLA would move a bare transpose into the product, and transpose K.
    scores = jnp.einsum("htd,hrd->htr", k, q_tile, precision="highest")
    return jnp.where(visible.T[None], scores, 0.0).swapaxes(1, 2)


weigh = partial(jnp.einsum, "hrt,htd->hrd", precision="highest")
