"""Problems of attention to time: shapes, their arrays, and the result by NumPy float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cost, formats, reference

# Against the float64 reference, by dtype of the queries; wide enough for what other libraries round.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2.0**-5}


@dataclass(frozen=True)
class Problem:
    """Attention of the last `queries[i]` of `lengths[i]` tokens, of each sequence.

    Attributes:
      kind: "decode", "prefill" or "shared prefix".
      lengths, queries: one a sequence.
      heads: query heads, KV heads and head_dim.
      page_size: tokens a page.
      stored: dtype of the pool, of codes int8 or uint8 (E4M3FN).
      dtype: of the queries.
      shared: tokens that all sequences begin with, in the same pages.
      layers: of the pool, taken in turns, so that what was just read is not read again from a cache.
    """

    kind: str
    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    heads: tuple[int, int, int] = (32, 8, 128)
    page_size: int = 16
    stored: str = "float32"
    dtype: str = "float32"
    shared: int = 0
    layers: int = 1

    @property
    def name(self) -> str:
        """One line: `decode 8 x 4096, 32/8/128, pages of 16, bfloat16`."""
        lengths = sorted(set(self.lengths))
        spread = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]}..{lengths[-1]}"
        asked = "" if max(self.queries) == 1 else f", {max(self.queries)} new"
        prefix = f", {self.shared} shared" if self.shared else ""
        heads = "/".join(map(str, self.heads))
        stored = {"uint8": "fp8"}.get(self.stored, self.stored)
        return (
            f"{self.kind} {len(self.lengths)} x {spread}{asked}{prefix}, {heads}, pages of {self.page_size}, "
            f"{stored}"
        )

    @cached_property
    def cost(self):
        """Flops and bytes of one layer, counted; what is shared is read once."""
        q_heads, kv_heads, head_dim = self.heads
        keys, pairs = cost.causal(self.lengths, self.queries)
        return cost.paged_attention(
            num_keys=keys - self.shared * (len(self.lengths) - 1),
            num_pairs=pairs,
            tokens=sum(self.queries),
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            q_dtype=self.dtype,
            storage=formats.of(self.stored),
        )


class Arrays(NamedTuple):
    """Arguments of `paged_attention`."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    page_table: jax.Array
    kv_lengths: jax.Array
    query_starts: jax.Array
    scales: tuple[jax.Array, ...]  # of a pool of codes


def build(problem: Problem) -> Arrays:
    """Random values; the pages are in random order."""
    q_heads, kv_heads, head_dim = problem.heads
    shared = problem.shared // problem.page_size
    own = [-(-length // problem.page_size) - shared for length in problem.lengths]
    order = np.random.default_rng(0).permutation(shared + sum(own)).astype(np.int32)
    table = np.full((len(own), shared + max(own)), len(order), np.int32)
    table[:, :shared] = order[:shared]
    for row, (end, count) in enumerate(zip(shared + np.cumsum(own), own, strict=True)):
        table[row, shared : shared + count] = order[end - count : end]
    keys = jax.random.split(jax.random.key(0), 3)
    shape = problem.layers, len(order), kv_heads, problem.page_size, head_dim
    storage = formats.of(problem.stored)

    def pool(key):
        values = jax.random.normal(key, shape, problem.dtype if storage.quantized else problem.stored)
        return storage.encode(values, keys=True) if storage.quantized else (values, None)

    (k, k_scale), (v, v_scale) = (jax.jit(pool)(key) for key in keys[:2])
    starts = np.cumsum([0, *problem.queries], dtype=np.int32)
    return Arrays(
        q=jax.random.normal(keys[2], (int(starts[-1]), q_heads, head_dim), problem.dtype),
        k_pages=k,
        v_pages=v,
        page_table=jnp.asarray(table),
        kv_lengths=jnp.asarray(problem.lengths, jnp.int32),
        query_starts=jnp.asarray(starts),
        scales=(k_scale, v_scale) if storage.quantized else (),
    )


def tokens_of(arrays: Arrays, seq: int, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """K and V of a sequence, `[length, kv_heads, head_dim]`, decoded."""
    length = int(arrays.kv_lengths[seq])
    ids = np.asarray(arrays.page_table[seq])[: -(-length // arrays.k_pages.shape[3])]
    tokens = []
    for nth, pages in enumerate((arrays.k_pages, arrays.v_pages)):
        own = np.asarray(pages[layer, ids])
        if arrays.scales:
            own = reference.dequantize(own, np.asarray(arrays.scales[nth][layer, ids]))
        tokens.append(own.swapaxes(1, 2).reshape(-1, own.shape[1], own.shape[3])[:length])
    return tokens[0], tokens[1]


def expected(problem: Problem, arrays: Arrays) -> dict[tuple[int, int], np.ndarray]:
    """The result by NumPy float64 for layer 0: rows of the first, the longest and the last sequence."""
    want, chosen = {}, {0, int(np.argmax(problem.lengths)), len(problem.lengths) - 1}
    for seq in sorted(chosen):
        first, end = (int(start) for start in arrays.query_starts[seq : seq + 2])
        # Of a long run of queries, the last ones.
        first = max(first, end - 16)
        q, k, v = (np.asarray(array, np.float64) for array in (arrays.q[first:end], *tokens_of(arrays, seq)))
        want[first, end], _ = reference.attention(q, k, v)
    return want


def worst_error(
    problem: Problem, want: dict[tuple[int, int], np.ndarray], out: jax.Array | np.ndarray
) -> float:
    """The largest error of a result, in units of the tolerance."""
    out, worst = np.asarray(out, np.float64), 0.0
    for (first, end), values in want.items():
        # Not Python's max, which a NaN would pass.
        worst = np.maximum(worst, np.abs(out[first:end] - values).max())
    return float(worst) / TOLERANCE[problem.dtype]


def uniform(seqs: int, length: int) -> tuple[int, ...]:
    """All of one length."""
    return (length,) * seqs


def ragged(seqs: int, low: int, high: int) -> tuple[int, ...]:
    """From short to long in even steps."""
    return tuple(np.linspace(low, high, seqs).astype(int).tolist())


def decode(lengths: Sequence[int], **options) -> Problem:
    """One query a sequence."""
    return Problem("decode", tuple(lengths), (1,) * len(lengths), **options)
