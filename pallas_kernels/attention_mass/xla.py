"""`attention_mass` in plain XLA: the specification of the other backends, and the CPU backend.

The loops are those of `paged_attention`: tiles of queries, and the tiles of keys that each attends to.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import control_flow
from pallas_kernels.attention_mass.call import Call
from pallas_kernels.attention_mass.weights import log_weights
from pallas_kernels.paged_attention.xla.key_tiles import KeyTiles
from pallas_kernels.paged_attention.xla.query_tiles import by_head, plan, query_tile
from pallas_kernels.paged_attention.xla.scores import score, see, side_by_side


def lacks(call: Call) -> str | None:
    """None: XLA supports every call."""


def run(call: Call, *, interpret: bool) -> Array:
    """See `api.attention_mass`."""
    del interpret
    sequences, scoring, lse = call.sequences, call.scoring, call.lse
    page_table, table_rows = sequences.page_table, sequences.table_rows
    q = side_by_side(call.queries)
    tokens, num_seqs, max_tokens = q.shape[0], sequences.count, call.max_keys
    layer, kv_heads = jnp.asarray(call.layer, jnp.int32), call.pool.shape[2]
    keys, pool = KeyTiles.of_pool(call.pool), call.pool.arrays
    # Here a tile's row is the index of its sequence, which is also its row of `mass`.
    seqs = jnp.arange(num_seqs, dtype=jnp.int32)
    size, hides = query_tile(tokens, num_seqs), {"window": scoring.window, "sink_tokens": scoring.sink_tokens}
    group = q.shape[1] // kv_heads
    work = plan(tokens, size, sequences.kv_lengths, sequences.query_starts, seqs, keys, group, **hides)
    queries = by_head(q.astype(jnp.float32) * scoring.scale, kv_heads, size)
    log_sums = by_head(lse[..., None], kv_heads, size)

    def visit_tile(tile, mass):
        seq, num_keys = work.table_row[tile], work.num_keys[tile]
        page_row = page_table[table_rows[seq]]
        row_indices = jnp.repeat(work.indices(tile), group)
        q_tile, log_sum = work.rows(queries, tile), work.rows(log_sums, tile)

        def visit(key_tile, mass):
            where = keys.locate(page_row, work.stands_for(key_tile, tile), num_keys)
            ((k, k_scale),) = keys.read(pool, layer, where)
            visible = see(row_indices, keys.indices(where), **hides)
            scores = score(q_tile, k, k_scale, visible, softcap=scoring.softcap)
            weights = jnp.where(visible[None], jnp.exp(log_weights(scores, log_sum)), 0.0)
            corner = seq, jnp.zeros((), jnp.int32), where.first
            # A tile adds zero at token slots that are not its own.
            own = jax.lax.dynamic_slice(mass, corner, (1, kv_heads, keys.size))
            return jax.lax.dynamic_update_slice(mass, own + _sum_of_rows(weights)[None], corner)

        first = work.first_key_tile[tile]
        return control_flow.fori_loop(first, first + work.num_key_tiles[tile], visit, mass)

    # Room for all of the last tile.
    room = -(-max_tokens // keys.size) * keys.size
    mass = jnp.zeros((num_seqs, kv_heads, room), jnp.float32)
    return control_flow.fori_loop(0, work.num_tiles, visit_tile, mass)[..., :max_tokens]


def _sum_of_rows(weights):
    # A matrix product: XLA would fuse the exponentials into a sum, and not vectorize them.
    ones = jnp.ones((weights.shape[0], 1, weights.shape[1]), jnp.float32)
    return jnp.einsum("hnr,hrt->hnt", ones, weights, precision="highest")[:, 0]
