"""`attention_mass` in Pallas Triton, for CUDA from sm_80 and ROCm from gfx942.

One program processes some key tiles of one sequence and KV head, and for each of them the query tiles that
attend to it. So every byte of K is read once, and one program computes the whole mass of a token slot.

    key tiles        0 1 2 3 4 5 6 7      with 3 programs each takes every third tile, since most queries
    program 1          x     x     x      attend to the first tiles

The weights of query tiles are added elementwise. Only the total is summed over the rows, which lie in several
warps.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import cost
from pallas_kernels.attention_mass.call import Call
from pallas_kernels.attention_mass.weights import log_weights
from pallas_kernels.device import Device
from pallas_kernels.formats import Format
from pallas_kernels.launch import launch
from pallas_kernels.paged_attention.call import Scoring
from pallas_kernels.paged_attention.masks import sees
from pallas_kernels.paged_attention.triton import tuning as tunings
from pallas_kernels.paged_attention.triton.rows import Rows, rows_like
from pallas_kernels.paged_attention.triton.scores import LOG2E, add_up, cap, product_for
from pallas_kernels.paged_attention.triton.tiles import assembled, read_tile, scale_loader
from pallas_kernels.paged_attention.triton.tuning import Tuning

# Programs per resident program: more balance the load better, fewer have less overhead.
_WAVES = 8


def lacks(call: Call) -> str | None:
    """What the kernel lacks for these arrays on this device, if anything."""
    return tunings.lacks_mass(Device.current(), call.q, call.pool.storage)


def run(call: Call, *, interpret: bool) -> jax.Array:
    """See `api.attention_mass`."""
    sequences, storage, (q,) = call.sequences, call.pool.storage, call.queries
    tuning = call.tuning or tunings.choose_mass(Device.current(), **call.shape)
    tokens, q_heads, head_dim = q.shape
    kv_heads, num_seqs, max_tokens = call.pool.shape[2], sequences.count, call.max_keys
    num_tiles = -(-max_tokens // tuning.key_tile)
    programs = min(num_tiles, -(-_WAVES * tuning.programs // (kv_heads * num_seqs)))
    (k_pages,) = call.pool.pages
    parts = storage.parts(k_pages.size, tuning)
    kernel = partial(
        _receive,
        rows=rows_like(q, kv_heads, tuning, partial(storage.layout, parts=parts)),
        storage=storage,
        assembled=assembled(storage, q.dtype, tuning, interpret),
        tuning=tuning,
        scoring=call.scoring,
        product=product_for(q.dtype, storage, tuning, interpret),
        tiles_a_program=-(-num_tiles // programs),
    )
    counted = cost.attention_mass(
        num_keys=max_tokens * num_seqs,
        num_pairs=max_tokens * tokens,
        tokens=tokens,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q_dtype=q.dtype,
        storage=storage,
        max_tokens=max_tokens * num_seqs,
    )
    layer = jnp.asarray(call.layer, jnp.int32).reshape(1)
    rows = sequences.page_table, sequences.table_rows, sequences.kv_lengths, sequences.query_starts
    pool = storage.read_view(k_pages, parts), *call.pool.scales
    return launch(
        kernel,
        grid=(kv_heads, num_seqs, programs),
        out_shape=jax.ShapeDtypeStruct((num_seqs, kv_heads, max_tokens), jnp.float32),
        name="attention_mass",
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        cost=counted,
        interpret=interpret,
    )(layer, *rows, q, call.lse, *pool)


def _receive(
    layer_ref,
    page_table_ref,
    table_rows_ref,
    lengths_ref,
    starts_ref,
    q_ref,
    lse_ref,
    k_ref,
    *refs,
    rows: Callable[..., Rows],
    storage: Format,
    assembled,
    tuning: Tuning,
    scoring: Scoring,
    product: Callable,
    tiles_a_program: int,
):
    scale, window, sink_tokens, softcap = scoring
    *scale_refs, mass_ref = refs
    head, seq, program = (pl.program_id(axis) for axis in range(3))
    layer, table_row, num_keys = layer_ref[0], table_rows_ref[seq], lengths_ref[seq]
    first_row, num_rows = starts_ref[seq], starts_ref[seq + 1] - starts_ref[seq]
    first_index, page_size = num_keys - num_rows, np.int32(k_ref.shape[3])
    size, key_tile = tuning.query_tile, tuning.key_tile

    def tiles_that_see(begin):
        """The query tiles that attend to the key tile from `begin` on: the first, and the end."""
        end = lax.div(num_rows + (size - 1), np.int32(size))
        if window is not None:
            last = jnp.clip(begin + (key_tile - 1 + window - first_index), 0, num_rows)
            in_window = lax.div(last + (size - 1), np.int32(size))
            end = jnp.where(begin < sink_tokens, end, in_window)
        return lax.div(jnp.maximum(begin - first_index, 0), np.int32(size)), jnp.where(
            begin < num_keys, end, 0
        )

    def visit(nth, _):
        begin = (program + nth * pl.num_programs(2)) * key_tile
        indices = begin + lax.iota(jnp.int32, key_tile)
        real, offsets = indices < num_keys, lax.rem(indices, page_size)
        ids = plgpu.load(page_table_ref.at[table_row, lax.div(indices, page_size)], mask=real, other=0)
        geometry = rows(first_row, num_rows, head)
        at = (layer, ids[:, None], head, offsets[:, None], geometry.layout.word[None, :])
        k = read_tile(k_ref.at[at], real[:, None] & geometry.layout.in_words, storage, assembled)
        k_scale = None
        for ref in scale_refs:
            load = scale_loader(ref, (layer, ids, head, offsets), real)
            scales = storage.load_scales(load, key_tile, q_ref.shape[2], keys=True)
            k, k_scale = storage.tile_values(k, scales, geometry.layout)

        def add_tile(tile, total):
            mine = rows(first_row + tile * size, num_rows - tile * size, head)
            scores = add_up(product, mine.load(q_ref), k)
            if k_scale is not None:
                scores = scores * k_scale[None, :]
            if softcap is not None:
                scores = cap(scores, scale, softcap)
            log_sum = plgpu.load(lse_ref.at[mine.token, mine.q_head], mask=mine.exists, other=0.0)
            row_index = first_index + tile * size + mine.offset
            visible = sees(row_index[:, None], indices[None, :], window=window, sink_tokens=sink_tokens)
            weights = jnp.exp2(log_weights(scores * scale, log_sum[:, None]) * LOG2E)
            return total + jnp.where(visible & mine.exists[:, None], weights, 0.0)

        nothing = jnp.zeros((geometry.row.shape[0], key_tile), jnp.float32)
        total = lax.fori_loop(*tiles_that_see(begin), add_tile, nothing)
        mass = jnp.sum(total, axis=0)
        plgpu.store(mass_ref.at[seq, head, indices], mass, mask=indices < mass_ref.shape[2])

    lax.fori_loop(0, tiles_a_program, visit, None)
