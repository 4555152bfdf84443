"""Finds prefixes that adjacent sequences share: pages that they begin with, from the page table.

    page table      3 8 5 1      run 0: sequences 0 1 2 share 3 8 5
                    3 8 5 4 7
                    3 8 5 6
                    2 9          run 1: sequence 3 shares nothing

K and V of a run's shared tokens are read once for all its sequences. The results are merged with those of
each sequence's own tokens by log-sum-exp (as in cascade attention and Hydragen, arXiv:2402.05099). Everything
is computed on the device, from the page table and the lengths.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

# Shared prefixes are looked for only if they can save this much: about what a GPU reads during one launch.
_LEAST_BYTES = 16 * 2**20


class Prefixes(NamedTuple):
    """Runs of adjacent sequences, padded with empty runs to the number of sequences.

    Attributes:
      table_rows: a row of the page table with the run's prefix.
      query_starts: first row of `q` of each run, and the end of the last.
      lengths: tokens that the run shares; 0 for none.
      skipped: the same by sequence.
    """

    table_rows: Int[Array, " runs"]
    query_starts: Int[Array, " runs+1"]
    lengths: Int[Array, " runs"]
    skipped: Int[Array, " seqs"]


def could_pay(num_seqs: int, num_tokens: int, max_keys: int, token_bytes: int) -> bool:
    """Whether sharing could pay in calls of these sizes; static.

    Calls with many queries per sequence are limited by arithmetic, which sharing does not reduce.
    """
    return num_tokens <= 16 * num_seqs and (num_seqs - 1) * max_keys * token_bytes >= _LEAST_BYTES


def find(
    page_table: Int[Array, "rows pages_per_seq"],
    table_rows: Int[Array, " seqs"],
    kv_lengths: Int[Array, " seqs"],
    query_starts: Int[Array, " seqs+1"],
    *,
    page_size: int,
    unit: int,
    token_bytes: int,
    partial_bytes: int,
) -> Prefixes:
    """Finds the runs that save bytes.

    A sequence joins the run of the one before it if they share at least half of what either shares with its
    other neighbour, so that a short prefix common to two runs does not merge them. A run of `n` sequences
    that share `s` tokens pays if the `(n - 1) * s * token_bytes` saved exceed the partial results of its
    rows, written and read once.

    Args:
      page_table, table_rows, kv_lengths, query_starts: as in `paged_attention`.
      page_size: tokens per page.
      unit: shared lengths are multiples of it.
      token_bytes: bytes of K and V of a token, in all heads of a layer.
      partial_bytes: bytes of the partial result of a row of `q`, in all heads.
    """
    num_seqs, width = table_rows.shape[0], page_table.shape[1]
    nth = jnp.arange(num_seqs, dtype=jnp.int32)
    first_index = kv_lengths - (query_starts[1:] - query_starts[:-1])
    has_queries = (kv_lengths > 0) & (first_index < kv_lengths)
    # The nearest sequences with queries; there may be sequences without queries between them.
    latest = lax.cummax(jnp.where(has_queries, nth, -1))
    next_one = lax.cummin(jnp.where(has_queries, nth, num_seqs), reverse=True)
    before = jnp.concatenate([jnp.full(1, -1, jnp.int32), latest[:-1]])
    after = jnp.concatenate([next_one[1:], jnp.full(1, num_seqs, jnp.int32)])
    same = page_table[table_rows] == page_table[table_rows[jnp.maximum(before, 0)]]
    column = jnp.arange(width, dtype=jnp.int32)
    num_pages = jnp.min(jnp.where(same, width, column[None, :]), axis=1)
    # Shared are only keys before the first query of each sequence, which all its queries attend to.
    before_queries = jnp.minimum(first_index, first_index[jnp.maximum(before, 0)])
    link = jnp.where(has_queries & (before >= 0), jnp.minimum(num_pages * page_size, before_queries), 0)
    others = jnp.maximum(link[jnp.maximum(before, 0)], link.at[after].get(mode="fill", fill_value=0))
    joins = (link >= unit) & (2 * link >= others)

    # A run includes the sequences between its members; the first run also those before it.
    begins = has_queries & ~joins
    run = jnp.maximum(jnp.cumsum(begins, dtype=jnp.int32) - 1, 0)
    starts = jnp.full(num_seqs + 1, query_starts[-1], jnp.int32)
    starts = starts.at[jnp.where(begins, run, num_seqs + 1)].set(query_starts[:-1], mode="drop")
    starts = starts.at[0].set(0)
    rows = jnp.zeros(num_seqs, jnp.int32).at[jnp.where(begins, run, num_seqs)].set(table_rows, mode="drop")
    members = jnp.zeros(num_seqs, jnp.int32).at[run].add(has_queries.astype(jnp.int32))
    most = jnp.iinfo(jnp.int32).max
    shared = jnp.full(num_seqs, most, jnp.int32).at[run].min(jnp.where(joins, link, most))
    shared = jnp.where(members > 1, shared // unit * unit, 0)
    saved = (members - 1).astype(jnp.float32) * shared.astype(jnp.float32) * token_bytes
    spent = (starts[1:] - starts[:-1]).astype(jnp.float32) * (2 * partial_bytes)
    shared = jnp.where(saved > spent, shared, 0)
    return Prefixes(rows, starts, shared, jnp.where(has_queries, shared[run], 0))
