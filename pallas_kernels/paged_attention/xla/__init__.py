"""`paged_attention` in plain XLA: the specification of the other backends, and the CPU backend.

A loop over tiles of queries, and within it a loop over the tiles of keys that each attends to:

    sequence 0, 1 query at index 5     q tile 0 x key tiles 0
    sequence 1, 1 query at index 300   q tile 1 x key tiles 0 1 2
    sequence 2, empty                  nothing

So the time is proportional to the actual tokens: no padding is computed, and no table is gathered densely.

Joint tiles of adjacent sequences visit shared prefixes first; the tiles of each sequence continue from their
partial results.

key_tiles     how pages are divided into tiles of K and V, and read
query_tiles   the rows of queries, and how they are divided into tiles
scores        masks, products, scales and caps
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import control_flow
from pallas_kernels.checks import as_layer, is_layer
from pallas_kernels.paged_attention import softmax
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.xla.key_tiles import KeyTiles
from pallas_kernels.paged_attention.xla.query_tiles import (
    QUERY_TILE,
    Work,
    by_head,
    by_token,
    plan,
    tile_classes,
)
from pallas_kernels.paged_attention.xla.scores import score, see, side_by_side, weigh
from pallas_kernels.ragged import ragged_rows


def lacks(call: Call) -> str | None:
    """None: XLA supports every call."""


def run(call: Call, *, interpret: bool):
    """See `api.paged_attention`. Returns `(out, lse)`, `out` before `Format.outputs`."""
    del interpret
    sequences, scoring, queries = call.sequences, call.scoring, call.queries
    page_table, sinks = sequences.page_table, call.sinks
    hides = {"window": scoring.window, "sink_tokens": scoring.sink_tokens}
    q_dtype = queries[0].dtype
    tokens, q_heads, head_dim = queries[0].shape
    num_layers, _, kv_heads, *_ = call.pool.shape
    exists = is_layer(call.layer, num_layers)
    layer = jnp.clip(as_layer(call.layer), 0, num_layers - 1)
    group = q_heads // kv_heads
    keys, pool = KeyTiles.of_pool(call.pool), call.pool.arrays
    classes = tile_classes(tokens, sequences.count)
    room = min(QUERY_TILE, tokens) if call.prefixes else max(size for size, _ in classes)
    q = by_head(side_by_side(queries).astype(jnp.float32) * scoring.scale, kv_heads, room)

    def visit_tiles(seen: softmax.Partial, work: Work) -> softmax.Partial:
        """Adds the keys of every tile to the partial results of its rows."""

        def visit_tile(tile, seen):
            page_row, num_keys = page_table[work.table_row[tile]], work.num_keys[tile]
            row_indices, q_tile = jnp.repeat(work.indices(tile), group), work.rows(q, tile)

            def visit(key_tile, own):
                where = keys.locate(page_row, work.stands_for(key_tile, tile), num_keys)
                (k, k_scale), (v, v_scale) = keys.read(pool, layer, where)
                visible = see(row_indices, keys.indices(where), **hides)
                scores = score(q_tile, k, k_scale, visible, softcap=scoring.softcap)
                scaled = weigh if v_scale is None else lambda p, v: weigh(p * v_scale.swapaxes(1, 2), v)
                return softmax.extend(own, scores, visible[None], v, product=scaled)

            before = jax.tree.map(lambda whole: work.rows(whole, tile), seen)
            first = work.first_key_tile[tile]
            own = control_flow.fori_loop(first, first + work.num_key_tiles[tile], visit, before)
            if work.size > 1:
                # Rows past the tile's own are of other sequences. Their weights are 0 here, but 0 times a
                # value that is not finite is NaN.
                own = jax.tree.map(partial(_where_rows, (row_indices >= 0)[None]), own, before)
            return jax.tree.map(lambda whole, part: work.with_rows(whole, part, tile), seen, own)

        return control_flow.fori_loop(0, work.num_tiles, visit_tile, seen)

    nothing_seen = seen = softmax.empty((kv_heads, q.shape[1]), head_dim)
    skipped = None
    if call.prefixes is not None:
        shared = call.prefixes(unit=keys.unit)
        skipped = shared.skipped
        runs = shared.lengths, shared.query_starts, shared.table_rows
        shared_work = plan(tokens, min(QUERY_TILE, tokens), *runs, keys, group, causal=False)

        def visit_shared():
            seen = visit_tiles(nothing_seen, shared_work)
            # A run may include padding rows, which attend to nothing.
            seq, _ = ragged_rows(sequences.query_starts[1:], q.shape[1] // group)
            has_keys = sequences.kv_lengths.at[seq].get(mode="fill", fill_value=0) > 0
            is_query = jnp.repeat(has_keys, group)[None]
            return jax.tree.map(partial(_where_rows, is_query), seen, nothing_seen)

        seen = control_flow.cond(jnp.any(shared.lengths > 0), visit_shared, lambda: nothing_seen)
    for size, counts in classes:
        work = plan(tokens, size, *sequences.lengths, keys, group, skipped=skipped, counts=counts, **hides)
        seen = visit_tiles(seen, work)
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, group), (1, q.shape[1] // group))
    out, lse = (jnp.where(exists, part, jnp.nan) for part in softmax.finish(seen, sinks))
    return by_token(out, tokens, group).astype(q_dtype), by_token(lse[..., None], tokens, group)[..., 0]


def _where_rows(mask, one, other):
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (one.ndim - mask.ndim)), one, other)
