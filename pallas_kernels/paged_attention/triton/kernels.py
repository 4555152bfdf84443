"""The launches and kernels of `paged_attention` in Pallas Triton.

One program processes one item of the schedule for one KV head: a query tile, with all query heads of the KV
head as the rows of one matrix product, and a run of key tiles. So every byte of K and V is read once,
whatever the number of query heads. If a query tile is divided into several items, each writes a partial
softmax, and a second launch merges them. A separate launch, with more rows per product, processes shared
prefixes; its results are merged likewise.

A key tile is a number of tokens, whatever the page size: each token's address comes from the page table,
and the page ids of the next tile are loaded while this one is processed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import cost
from pallas_kernels.checks import as_layer, is_layer
from pallas_kernels.device import Device
from pallas_kernels.formats import Format
from pallas_kernels.launch import launch
from pallas_kernels.paged_attention import schedule, softmax
from pallas_kernels.paged_attention.call import Call, Scoring
from pallas_kernels.paged_attention.masks import sees
from pallas_kernels.paged_attention.triton import tuning as tunings
from pallas_kernels.paged_attention.triton.rows import Rows, rows_like
from pallas_kernels.paged_attention.triton.scores import add_up, cap, product_for, scale_in_two
from pallas_kernels.paged_attention.triton.tiles import assembled, read_tile, scale_loader
from pallas_kernels.paged_attention.triton.tuning import Tuning
from pallas_kernels.ragged import ragged_rows

# Below any scale except zero, with a finite inverse.
_LEAST_SCALE = 1e-35


@dataclass(frozen=True, eq=False, slots=True)
class _Launches:
    """What the launches of a call have in common.

    Attributes:
      arrays: the layer, the page table, sinks, queries, the pool, and further queries.
      call: the call.
      parts: of a row of the pool; see `Format.parts`.
      cost: of all launches.
      interpret: run without a GPU.
    """

    arrays: tuple[jax.Array, ...]
    call: Call
    parts: int
    cost: pl.CostEstimate
    interpret: bool


def run(call: Call, *, interpret: bool):
    """See `api.paged_attention`. Returns `(out, lse)`, `out` before `Format.outputs`."""
    # Matrix units take 16-bit operands.
    q, *more_queries = (part.astype(call.q.dtype) for part in call.queries)
    tuning = call.tuning or tunings.choose(Device.current(), **call.shape)
    shared_tuning = call.shared_tuning or tunings.choose_shared(Device.current(), **call.shape)
    sequences, scoring, storage = call.sequences, call.scoring, call.pool.storage
    tokens, q_heads, head_dim = q.shape
    num_layers, _, kv_heads, *_ = call.pool.shape
    num_seqs, max_keys = sequences.count, call.max_keys
    shared = None
    if call.prefixes is not None:
        shared = call.prefixes(unit=max(tuning.key_tile, shared_tuning.key_tile))
    skipped = None if shared is None else shared.skipped
    tiles = schedule.query_tiles(
        tokens, tuning.query_tile, *sequences.lengths, window=scoring.window, skipped=skipped
    )
    num_tiles = tiles.num_keys.shape[0]
    prompts = tokens > 16 * num_seqs
    num_items = tuning.num_items(num_tiles, kv_heads, max_keys, prompts=prompts)
    if shared is not None:
        num_items = max(num_items, num_tiles + 1)
    split = num_items > num_tiles
    if split:
        items = schedule.share(tiles, num_items, tuning.key_tile, sink_tokens=scoring.sink_tokens)
    else:
        items = schedule.whole(
            tiles, tuning.key_tile, heaviest_first=prompts, sink_tokens=scoring.sink_tokens
        )
    sinks = call.sinks
    if sinks is None:
        sinks = jnp.full(q_heads, -jnp.inf, jnp.float32)
    sinks = sinks.astype(jnp.float32).reshape(kv_heads, -1)

    parts = storage.parts(call.pool.pages[0].size, tuning)
    views = [storage.read_view(pages, parts) for pages in call.pool.pages]
    layer = _layer_and_whether(call.layer, num_layers)
    counted = cost.paged_attention(
        num_keys=max_keys * num_seqs,
        num_pairs=max_keys * tokens,
        tokens=tokens,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q_dtype=q.dtype,
        storage=storage,
    )
    arrays = layer, sequences.page_table, sinks, q, *views, *call.pool.scales, *more_queries
    launches = _Launches(arrays, call, parts, counted, interpret)
    results = _visit(launches, tiles, items, tuning, scoring, split=split, name="paged_attention")
    if not split:
        return results
    merged = [arrays[0], items.starts, tiles.first_row, tiles.num_rows, tiles.num_keys, sinks, *results]
    if shared is not None:
        size = shared_tuning.query_tile
        runs = shared.lengths, shared.query_starts, shared.table_rows
        shared_tiles = schedule.query_tiles(tokens, size, *runs, causal=False)
        # A run with a shared prefix has at least two sequences.
        busy = min(shared_tiles.num_keys.shape[0], num_seqs // 2 + tokens // size)
        num_items = busy + max(1, shared_tuning.programs // kv_heads)
        items = schedule.share(shared_tiles, num_items, shared_tuning.key_tile, busy=busy)
        tile, row = ragged_rows(jnp.cumsum(shared_tiles.num_rows, dtype=jnp.int32), tokens)
        name, scoring = "paged_attention_shared", scoring._replace(window=None)
        results = _visit(launches, shared_tiles, items, shared_tuning, scoring, split=True, name=name)
        merged += [items.starts, tile, row, *results]
    return tuple(
        launch(
            partial(
                _merge,
                rows=rows_like(q, kv_heads, tuning),
                scale=scoring.scale,
            ),
            grid=(kv_heads, num_tiles),
            out_shape=_outputs(q),
            name="paged_attention_merge",
            num_warps=4,
            num_stages=2,
            cost=None,
            interpret=interpret,
        )(*merged)
    )


def _layer_and_whether(layer, num_layers: int):
    """The layer clipped to the pool, and whether it was in range; otherwise every row becomes NaN."""
    clipped = jnp.clip(as_layer(layer), 0, num_layers - 1)
    return jnp.stack([clipped, is_layer(layer, num_layers).astype(jnp.int32)])


def _outputs(q):
    return jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)


def _visit(
    launches: _Launches,
    tiles: schedule.QueryTiles,
    items: schedule.Items,
    tuning: Tuning,
    scoring: Scoring,
    *,
    split: bool,
    name: str,
) -> tuple[jax.Array, ...]:
    """One launch: attention of the tiles, complete (`out, lse`) or a partial result per item (`m, l, o`)."""
    q, storage, interpret = launches.arrays[3], launches.call.pool.storage, launches.interpret
    kv_heads = launches.call.pool.shape[2]
    rows = tuning.query_tile * (q.shape[1] // kv_heads)
    shape = items.tile.shape[0], kv_heads, rows
    partials = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2 + [
        jax.ShapeDtypeStruct((*shape, q.shape[2]), jnp.float32)
    ]
    kernel = partial(
        _attend,
        rows=rows_like(q, kv_heads, tuning, partial(storage.layout, parts=launches.parts)),
        storage=storage,
        assembled=assembled(storage, q.dtype, tuning, interpret),
        key_tile=tuning.key_tile,
        scoring=scoring,
        product=product_for(q.dtype, storage, tuning, interpret),
        split=split,
    )
    return tuple(
        launch(
            kernel,
            grid=(kv_heads, items.tile.shape[0]),
            out_shape=partials if split else _outputs(q),
            name=name,
            num_warps=tuning.num_warps,
            num_stages=tuning.num_stages,
            cost=launches.cost,
            interpret=interpret,
        )(*items[:3], *tiles, *launches.arrays)
    )


def _attend(
    tile_ref,
    begin_ref,
    end_ref,
    table_row_ref,
    first_row_ref,
    num_rows_ref,
    first_index_ref,
    first_key_ref,
    num_keys_ref,
    layer_ref,
    page_table_ref,
    sinks_ref,
    q_ref,
    k_ref,
    v_ref,
    *refs,
    rows: Callable[..., Rows],
    storage: Format,
    assembled,
    key_tile: int,
    scoring: Scoring,
    product: Callable,
    split: bool,
):
    scale, window, sink_tokens, softcap = scoring
    outs = 3 if split else 2
    scale_refs, rest_refs = (refs[:2], refs[2:]) if storage.quantized else ((), refs)
    more_q_refs, out_refs = rest_refs[:-outs], rest_refs[-outs:]
    head, item = pl.program_id(0), pl.program_id(1)
    layer, tile = layer_ref[0], tile_ref[item]
    begin, end = begin_ref[item], end_ref[item]
    num_keys, first_index, num_rows = num_keys_ref[tile], first_index_ref[tile], num_rows_ref[tile]
    table_row, page_size = table_row_ref[tile], np.int32(k_ref.shape[3])
    mine = rows(first_row_ref[tile], num_rows, head)
    row_index = first_index + mine.offset
    q = mine.load(q_ref)
    factor, rest = scale_in_two(scale)
    for more_q_ref in more_q_refs:
        q += mine.load(more_q_ref)

    def indices_of(key):
        return key * key_tile + lax.iota(jnp.int32, key_tile)

    def page_ids(key):
        indices = indices_of(key)
        return plgpu.load(
            page_table_ref.at[table_row, lax.div(indices, page_size)], mask=indices < num_keys, other=0
        )

    def weigh(p, v):
        return tuple(product(p, part) for part in v)

    def weigh_codes(scale, p, v):
        if q_ref.dtype != jnp.float16:
            return weigh(p * scale[None, :], v)
        # The smallest scales would underflow in float16.
        most = jnp.maximum(jnp.max(scale), _LEAST_SCALE)
        return tuple(part * most for part in weigh(p * (scale / most)[None, :], v))

    def visit(key, carry, *, edge: bool):
        seen, ids = carry
        indices = indices_of(key)
        real = mine.layout.in_words & ((indices < num_keys) if edge else (indices >= 0))[:, None]
        offsets = lax.rem(indices, page_size)
        at = (layer, ids[:, None], head, offsets[:, None], mine.layout.word[None, :])
        k, v = (read_tile(ref.at[at], real, storage, assembled) for ref in (k_ref, v_ref))
        tokens = layer, ids, head, offsets
        k_scale = v_scale = None
        if scale_refs:
            scales = [
                storage.load_scales(
                    scale_loader(ref, tokens, indices < num_keys), key_tile, q_ref.shape[2], keys=keys
                )
                for ref, keys in zip(scale_refs, (True, False), strict=True)
            ]
            (k, k_scale), (v, v_scale) = (
                storage.tile_values(*pair, mine.layout) for pair in zip((k, v), scales, strict=True)
            )
        next_ids = page_ids(key + 1)
        scores, weigh_tile = add_up(product, q, k), weigh
        if k_scale is not None:
            scores = scores * k_scale[None, :]
        if v_scale is not None:
            weigh_tile = partial(weigh_codes, v_scale)
        if softcap is not None:
            scores = cap(scores, scale, softcap)
        scores = scores * factor
        visible = None
        if edge:
            visible = sees(row_index[:, None], indices[None, :], window=window, sink_tokens=sink_tokens)
        seen = softmax.extend(seen, scores, visible, v, scale=rest, product=weigh_tile, exp=jnp.exp2)
        return seen, next_ids

    seen, start = mine.nothing_seen(), begin
    if sink_tokens:
        first = lax.div(first_key_ref[tile], np.int32(key_tile))
        start, instead = (
            jnp.clip(first, begin, end),
            schedule.first_visited(first, -(-sink_tokens // key_tile)),
        )
        # A separate loop over the actual tiles with sink tokens: selecting a tile would take registers.
        low, high = jnp.maximum(begin - instead, 0), start - instead
        seen, _ = lax.fori_loop(low, high, partial(visit, edge=True), (seen, page_ids(low)))
    carry = seen, page_ids(start)
    # In the interior every row attends to every token of a tile, and nothing is masked.
    low, high = start, jnp.clip((first_index + 1) // key_tile, start, end)
    if window is not None:
        low = jnp.clip(-((window - first_index - num_rows) // key_tile), start, high)
        carry = lax.fori_loop(start, low, partial(visit, edge=True), carry)
    carry = lax.fori_loop(low, high, partial(visit, edge=False), carry)
    seen, _ = lax.fori_loop(high, end, partial(visit, edge=True), carry)
    if split:
        # An item without key tiles is past the last one; its result is never read.
        pl.when(begin < end)(lambda: mine.store_partial(softmax.Partial(*out_refs), item, seen))
    else:
        out_ref, lse_ref = out_refs
        mine.store(out_ref, lse_ref, seen, sinks_ref, layer_ref[1] > 0, scale=scale)


def _merge(
    layer_ref,
    starts_ref,
    first_row_ref,
    num_rows_ref,
    num_keys_ref,
    sinks_ref,
    *refs,
    rows,
    scale: float,
):
    """Merges the items of a query tile, and those of its shared prefixes, to rows of the output."""
    *refs, out_ref, lse_ref = refs
    head, tile = pl.program_id(0), pl.program_id(1)
    mine = rows(first_row_ref[tile], num_rows_ref[tile], head)
    _, rest = scale_in_two(scale)

    def visit(item, seen):
        part = mine.load_partial(softmax.Partial(*refs[:3]), item, mine.row, mine.in_tile)
        return softmax.merge(seen, part, scale=rest, exp=jnp.exp2)

    seen = lax.fori_loop(starts_ref[tile], starts_ref[tile + 1], visit, mine.nothing_seen())
    if refs[3:]:
        shared_starts_ref, shared_tile_ref, shared_row_ref, *shared = refs[3:]
        # A run may include padding rows, which attend to nothing.
        is_query = mine.exists & (num_keys_ref[tile] > 0)
        shared_tile, shared_row = (
            plgpu.load(ref.at[mine.token], mask=is_query, other=0)
            for ref in (shared_tile_ref, shared_row_ref)
        )
        group = sinks_ref.shape[1]
        first, end = (
            plgpu.load(shared_starts_ref.at[shared_tile + n], mask=is_query, other=0) for n in range(2)
        )

        def visit_shared(nth, seen):
            item = first + nth
            row = shared_row * group + mine.in_group
            part = mine.load_partial(softmax.Partial(*shared), item, row, item < end)
            return softmax.merge(seen, part, scale=rest, exp=jnp.exp2)

        seen = lax.fori_loop(0, jnp.max(end - first), visit_shared, seen)
    mine.store(out_ref, lse_ref, seen, sinks_ref, layer_ref[1] > 0, scale=scale)
