"""`paged_attention` in Pallas Triton, for CUDA from sm_80 and ROCm from gfx942.

One program takes one item of the schedule for one KV head: a query tile, with all query heads of the KV
head as the rows of one matrix product, and a run of key tiles. So every byte of K and V is read once,
whatever the number of query heads. Where a query tile is cut into several items, each leaves a partial
softmax behind and a second launch merges them.

A key tile is a number of tokens, whatever the page size: each token's address comes from the page table,
and the ids of the next tile are fetched while this one is worked on.
"""

from collections.abc import Callable
from functools import partial
from math import e, log2

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import cost
from pallas_kernels.launch import launch
from pallas_kernels.paged_attention import schedule, softmax
from pallas_kernels.paged_attention.tuning import Tuning
from pallas_kernels.quantization import as_float8
from pallas_kernels.sizes import next_power_of_two

# The softmax counts in powers of two.
_LOG2E = log2(e)
# Below any scale but zero, and its inverse is finite.
_LEAST_SCALE = 1e-35


def paged_attention(
    q,
    k_pages,
    v_pages,
    page_table,
    table_rows,
    kv_lengths,
    query_starts,
    *,
    layer,
    scale,
    window,
    softcap,
    sinks,
    k_scales,
    v_scales,
    tuning: Tuning,
    interpret: bool,
):
    """See `api.paged_attention`. Returns `(out, lse)`."""
    k_pages, v_pages = as_float8(k_pages), as_float8(v_pages)
    tokens, q_heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[2:4]
    group = q_heads // kv_heads
    size = tuning.query_tile
    tiles = schedule.query_tiles(tokens, size, kv_lengths, query_starts, table_rows)
    num_tiles = tiles.num_keys.shape[0]
    num_items = tuning.num_items(
        num_tiles,
        kv_heads,
        page_table.shape[1] * page_size,
        prompts=tokens > 16 * kv_lengths.shape[0],
    )
    split = num_items > num_tiles
    if split:
        items = schedule.share(tiles, num_items, tuning.key_tile, window)
    else:
        items = schedule.whole(tiles, tuning.key_tile, window)
    if sinks is None:
        sinks = jnp.full(q_heads, -jnp.inf, jnp.float32)
    sinks = sinks.astype(jnp.float32).reshape(kv_heads, group)

    rows = size * group
    block_rows = max(16, next_power_of_two(rows))
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    lse = jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)
    partials = (
        jax.ShapeDtypeStruct((num_items, kv_heads, rows), jnp.float32),
        jax.ShapeDtypeStruct((num_items, kv_heads, rows), jnp.float32),
        jax.ShapeDtypeStruct((num_items, kv_heads, rows, head_dim), jnp.float32),
    )
    geometry = partial(_Rows, group=group, size=size, block=block_rows, head_dim=head_dim)
    attend = partial(
        _attend,
        rows=geometry,
        key_tile=tuning.key_tile,
        scale=scale,
        window=window,
        softcap=softcap,
        # The interpreter's CPU has float32 and nothing like it.
        precision=lax.Precision.HIGHEST if interpret else tuning.precision(q.dtype, k_pages.dtype),
        split=split,
        quantized=k_scales is not None,
    )
    scales = () if k_scales is None else (k_scales, v_scales)
    results = launch(
        attend,
        grid=(kv_heads, num_items),
        out_shape=partials if split else (out, lse),
        name="paged_attention",
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        cost=cost.paged_attention(
            num_keys=page_table.shape[1] * page_size * kv_lengths.shape[0],
            num_pairs=page_table.shape[1] * page_size * tokens,
            tokens=tokens,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            q_dtype=q.dtype,
            kv_dtype=k_pages.dtype,
        ),
        interpret=interpret,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        *items[:3],
        *tiles,
        page_table,
        sinks,
        q,
        k_pages,
        v_pages,
        *scales,
    )
    if not split:
        return tuple(results)
    return tuple(
        launch(
            partial(_merge, rows=geometry),
            grid=(kv_heads, num_tiles),
            out_shape=(out, lse),
            name="paged_attention_merge",
            num_warps=4,
            num_stages=2,
            cost=None,
            interpret=interpret,
        )(items.starts, tiles.first_row, tiles.num_rows, sinks, *results)
    )


class _Rows:
    """The rows of a program's matrix product: query tokens x query heads of one KV head."""

    def __init__(self, first_row, num_rows, head, *, group: int, size: int, block: int, head_dim: int):
        self.row = lax.iota(jnp.int32, block)
        self.dims = lax.iota(jnp.int32, next_power_of_two(head_dim))
        self.in_head = (self.dims < head_dim)[None, :]
        self.in_tile = self.row < size * group
        self.offset = lax.div(self.row, np.int32(group))
        self.exists = (self.offset < num_rows) & self.in_tile
        self.token = first_row + self.offset
        self.head, self.in_group = head, lax.rem(self.row, np.int32(group))
        self.q_head = head * group + self.in_group

    def nothing_seen(self) -> softmax.Partial:
        """What each row starts from."""
        return softmax.empty(self.row.shape, self.dims.shape[0])

    def load(self, q):
        """`[block, head_dim]`, zeros where there is no row."""
        return plgpu.load(self._at(q), mask=self._mask(), other=0.0)

    def store(self, out, lse, seen: softmax.Partial, sinks):
        """Writes the rows that exist, when they have seen all."""
        sinks = plgpu.load(sinks.at[self.head, self.in_group], mask=self.exists, other=0.0)
        values, log_sum = softmax.finish(seen, sinks * _LOG2E, exp=jnp.exp2, log=jnp.log2)
        plgpu.store(self._at(out), values.astype(out.dtype), mask=self._mask())
        plgpu.store(lse.at[self.token, self.q_head], log_sum / _LOG2E, mask=self.exists)

    def load_partial(self, parts, item) -> softmax.Partial:
        """What an item's program left behind."""
        return softmax.Partial(
            m=plgpu.load(parts.m.at[item, self.head, self.row], mask=self.in_tile, other=softmax.LOWEST),
            l=plgpu.load(parts.l.at[item, self.head, self.row], mask=self.in_tile, other=0.0),
            o=plgpu.load(self._at_item(parts.o, item), mask=self.in_tile[:, None] & self.in_head, other=0.0),
        )

    def store_partial(self, parts, item, seen: softmax.Partial):
        """Leaves it behind."""
        plgpu.store(parts.m.at[item, self.head, self.row], seen.m, mask=self.in_tile)
        plgpu.store(parts.l.at[item, self.head, self.row], seen.l, mask=self.in_tile)
        plgpu.store(self._at_item(parts.o, item), seen.o, mask=self.in_tile[:, None] & self.in_head)

    def _at(self, array):
        return array.at[self.token[:, None], self.q_head[:, None], self.dims[None, :]]

    def _at_item(self, array, item):
        return array.at[item, self.head, self.row[:, None], self.dims[None, :]]

    def _mask(self):
        return self.exists[:, None] & self.in_head


def _attend(
    layer_ref,
    tile_ref,
    begin_ref,
    end_ref,
    table_row_ref,
    first_row_ref,
    num_rows_ref,
    first_place_ref,
    num_keys_ref,
    page_table_ref,
    sinks_ref,
    q_ref,
    k_ref,
    v_ref,
    *refs,
    rows: Callable[..., _Rows],
    key_tile: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    precision,
    split: bool,
    quantized: bool,
):
    scale_refs, out_refs = (refs[:2], refs[2:]) if quantized else ((), refs)
    head, item = pl.program_id(0), pl.program_id(1)
    layer, tile = layer_ref[0], tile_ref[item]
    begin, end = begin_ref[item], end_ref[item]
    num_keys, first_place, num_rows = num_keys_ref[tile], first_place_ref[tile], num_rows_ref[tile]
    table_row, page_size = table_row_ref[tile], np.int32(k_ref.shape[3])
    mine = rows(first_row_ref[tile], num_rows, head)
    row_place = first_place + mine.offset
    q = mine.load(q_ref)
    # Codes of one byte are exact in any dtype of 16 bits; numbers of another dtype meet q in float32.
    wide = q_ref.dtype if q_ref.dtype == k_ref.dtype or quantized else jnp.float32

    def places_of(key):
        return key * key_tile + lax.iota(jnp.int32, key_tile)

    def page_ids(key):
        places = places_of(key)
        return plgpu.load(
            page_table_ref.at[table_row, lax.div(places, page_size)], mask=places < num_keys, other=0
        )

    def product(a, b, **transposed):
        return plgpu.dot(a.astype(wide), b.astype(wide), precision=precision, **transposed)

    def weigh_codes(scale, p, v):
        if wide != jnp.float16:
            return product(p * scale[None, :], v)
        # The smallest scales would be below what float16 can tell apart.
        most = jnp.maximum(jnp.max(scale), _LEAST_SCALE)
        return product(p * (scale / most)[None, :], v) * most

    def visit(key, carry, *, edge: bool):
        seen, ids = carry
        places = places_of(key)
        real = mine.in_head & ((places < num_keys) if edge else (places >= 0))[:, None]
        offsets = lax.rem(places, page_size)
        at = (layer, ids[:, None], head, offsets[:, None], mine.dims[None, :])
        zero = jnp.zeros((), k_ref.dtype)
        k = plgpu.load(k_ref.at[at], mask=real, other=zero)
        v = plgpu.load(v_ref.at[at], mask=real, other=zero)
        scales_of_tile = [
            plgpu.load(scales.at[layer, ids, head, offsets], mask=places < num_keys, other=0.0)
            for scales in scale_refs
        ]
        next_ids = page_ids(key + 1)
        scores, weigh = product(q, k, trans_b=True), product
        if quantized:
            k_scale, v_scale = scales_of_tile
            scores, weigh = scores * k_scale[None, :], partial(weigh_codes, v_scale)
        if softcap is None:
            scores = scores * (scale * _LOG2E)
        else:
            scores = (softcap * _LOG2E) * _tanh(scores * (scale / softcap))
        visible = None
        if edge:
            visible = places[None, :] <= row_place[:, None]
            if window is not None:
                visible &= places[None, :] > row_place[:, None] - window
        return softmax.extend(seen, scores, visible, v, product=weigh, exp=jnp.exp2), next_ids

    carry = mine.nothing_seen(), page_ids(begin)
    # In the interior every row sees every token of a tile, and nothing is masked.
    low, high = begin, jnp.clip((first_place + 1) // key_tile, begin, end)
    if window is not None:
        low = jnp.clip(-((window - first_place - num_rows) // key_tile), begin, high)
        carry = lax.fori_loop(begin, low, partial(visit, edge=True), carry)
    carry = lax.fori_loop(low, high, partial(visit, edge=False), carry)
    seen, _ = lax.fori_loop(high, end, partial(visit, edge=True), carry)
    if split:
        # An item without key tiles is past the last one, and nobody reads what it would leave.
        pl.when(begin < end)(lambda: mine.store_partial(softmax.Partial(*out_refs), item, seen))
    else:
        out_ref, lse_ref = out_refs
        mine.store(out_ref, lse_ref, seen, sinks_ref)


def _merge(
    starts_ref, first_row_ref, num_rows_ref, sinks_ref, m_ref, l_ref, o_ref, out_ref, lse_ref, *, rows
):
    """The items of one query tile become its rows of the output."""
    head, tile = pl.program_id(0), pl.program_id(1)
    mine = rows(first_row_ref[tile], num_rows_ref[tile], head)
    parts = softmax.Partial(m_ref, l_ref, o_ref)

    def visit(item, seen):
        return softmax.merge(seen, mine.load_partial(parts, item), exp=jnp.exp2)

    seen = lax.fori_loop(starts_ref[tile], starts_ref[tile + 1], visit, mine.nothing_seen())
    mine.store(out_ref, lse_ref, seen, sinks_ref)


def _tanh(x):
    # Triton's own is a call into the vendor's library; this is one exponential. Near zero, where the
    # difference would lose digits, it is the series.
    square = x * x
    series = x * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return jnp.where(square < 0.04, series, 1.0 - 2.0 / (jnp.exp2((2.0 * _LOG2E) * x) + 1.0))
