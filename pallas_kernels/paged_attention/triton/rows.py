"""The rows of a Triton program's matrix products: their queries, and how they are loaded and stored."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.formats.base import Layout, plain_layout
from pallas_kernels.paged_attention import softmax
from pallas_kernels.paged_attention.triton.scores import LOG2E, scale_in_two
from pallas_kernels.paged_attention.triton.tuning import Tuning
from pallas_kernels.sizes import next_power_of_two


def rows_like(
    q, kv_heads: int, tuning: Tuning, layout: Callable[[int], Layout] = plain_layout
) -> Callable[..., "Rows"]:
    """A function that makes `Rows` from the first row, the number of rows and the head."""
    group = q.shape[1] // kv_heads
    return partial(Rows, group=group, size=tuning.query_tile, head_dim=q.shape[2], layout=layout)


def _exp(x):
    return jnp.exp2(x * LOG2E)


def _log(x):
    return jnp.log2(x) / LOG2E


class Rows:
    """The rows of a program's matrix product: query tokens x query heads of one KV head.

    Arrays as wide as a head are divided into parts, with the layout of a tile of keys.
    """

    def __init__(
        self,
        first_row,
        num_rows,
        head,
        *,
        group: int,
        size: int,
        head_dim: int,
        layout: Callable[[int], Layout],
    ):
        self.row = lax.iota(jnp.int32, max(16, next_power_of_two(size * group)))
        self.in_tile = self.row < size * group
        self.offset = lax.div(self.row, np.int32(group))
        self.exists = (self.offset < num_rows) & self.in_tile
        self.token = first_row + self.offset
        self.head, self.in_group = head, lax.rem(self.row, np.int32(group))
        self.q_head = head * group + self.in_group
        self.layout = layout(head_dim)
        self.dims, self.in_head = self.layout.dims, self.layout.in_head

    def nothing_seen(self) -> softmax.Partial:
        """The initial partial result of each row."""
        m, l, o = softmax.empty(self.row.shape, self.dims[0].shape[0])  # noqa: E741
        return softmax.Partial(m, l, (o,) * len(self.dims))

    def load(self, q):
        """Loads `[rows, width]` for each part, zeros for rows that do not exist."""
        mask = self.exists[:, None] & self.in_head
        return tuple(plgpu.load(at, mask=mask, other=0.0) for at in self._at(q))

    def store(self, out, lse, seen: softmax.Partial, sinks, is_layer, *, scale: float):
        """Writes the complete rows that exist; NaN if the layer is out of range."""
        sinks = plgpu.load(sinks.at[self.head, self.in_group], mask=self.exists, other=0.0)
        _, rest = scale_in_two(scale)
        values, log_sum = softmax.finish(seen, sinks, scale=rest / LOG2E, exp=_exp, log=_log)
        log_sum = jnp.where(is_layer, log_sum, jnp.nan)
        for at, part in zip(self._at(out), values, strict=True):
            part = jnp.where(is_layer, part, jnp.nan)
            plgpu.store(at, part.astype(out.dtype), mask=self.exists[:, None] & self.in_head)
        plgpu.store(lse.at[self.token, self.q_head], log_sum, mask=self.exists)

    def load_partial(self, parts, item, row, mask) -> softmax.Partial:
        """Loads the partial result of an item for each of these rows."""
        at = item, self.head, row
        wide = mask[:, None] & self.in_head
        return softmax.Partial(
            m=plgpu.load(parts.m.at[at], mask=mask, other=softmax.LOWEST),
            l=plgpu.load(parts.l.at[at], mask=mask, other=0.0),
            o=tuple(plgpu.load(at, mask=wide, other=0.0) for at in self._at_item(parts.o, item, row)),
        )

    def store_partial(self, parts, item, seen: softmax.Partial):
        """Stores the partial result of an item."""
        plgpu.store(parts.m.at[item, self.head, self.row], seen.m, mask=self.in_tile)
        plgpu.store(parts.l.at[item, self.head, self.row], seen.l, mask=self.in_tile)
        for at, part in zip(self._at_item(parts.o, item, self.row), seen.o, strict=True):
            plgpu.store(at, part, mask=self.in_tile[:, None] & self.in_head)

    def _at(self, array):
        rows = self.token[:, None], self.q_head[:, None]
        return [array.at[*rows, dims[None, :]] for dims in self.dims]

    def _at_item(self, array, item, row):
        item = item if item.ndim == 0 else item[:, None]
        return [array.at[item, self.head, row[:, None], dims[None, :]] for dims in self.dims]
