"""What neighbouring sequences share: the pages that they begin with, as the page table shows them.

    page table      3 8 5 1      run 0: sequences 0 1 2 share 3 8 5
                    3 8 5 4 7
                    3 8 5 6
                    2 9          run 1: sequence 3 shares nothing

K and V of a run's shared places are read once for all its sequences, and each one's results merged with
those of its own places by log-sum-exp (as cascade attention and Hydragen, arXiv:2402.05099, do). All of it is
worked out on the device, from the page table and the lengths.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

# What sharing must save at most for a program to look for it: about what a GPU reads while one more kernel
# is launched.
_LEAST_BYTES = 16 * 2**20


class Prefixes(NamedTuple):
    """Runs of neighbouring sequences, as many as there are sequences; those past the last are empty.

    Attributes:
      table_rows: a row of the page table that holds it, for each run.
      query_starts: first row of `q` of each run, and the end of the last.
      lengths: places that the run shares; 0 where it shares none.
      skipped: the same by sequence.
    """

    table_rows: Int[Array, " runs"]
    query_starts: Int[Array, " runs+1"]
    lengths: Int[Array, " runs"]
    skipped: Int[Array, " seqs"]


def could_pay(num_seqs: int, num_tokens: int, max_keys: int, token_bytes: int) -> bool:
    """Whether calls of these sizes could share so much that looking for it pays; static.

    Long runs of queries are bound by arithmetic, of which sharing saves none.
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
    """Finds the runs, and those that pay.

    A sequence joins the run of the one before it if it shares with it at least half of what either shares
    with its neighbour on the other side, so that the short prefix of two runs does not cut their long ones.
    A run of `n` sequences that share `s` places pays if the `(n - 1) * s * token_bytes` that are not read
    again are more than the partial results of its rows, written and read once.

    Args:
      page_table, table_rows, kv_lengths, query_starts: as in `paged_attention`.
      page_size: tokens a page.
      unit: a shared length is a multiple of it.
      token_bytes: of K and V of a token, in all heads of a layer.
      partial_bytes: of the partial result of a row of `q`, in all heads.
    """
    num_seqs, width = table_rows.shape[0], page_table.shape[1]
    nth = jnp.arange(num_seqs, dtype=jnp.int32)
    first_place = kv_lengths - (query_starts[1:] - query_starts[:-1])
    asks = (kv_lengths > 0) & (first_place < kv_lengths)
    # The neighbours that ask; between them may lie sequences that do not.
    latest = lax.cummax(jnp.where(asks, nth, -1))
    next_one = lax.cummin(jnp.where(asks, nth, num_seqs), reverse=True)
    before = jnp.concatenate([jnp.full(1, -1, jnp.int32), latest[:-1]])
    after = jnp.concatenate([next_one[1:], jnp.full(1, num_seqs, jnp.int32)])
    same = page_table[table_rows] == page_table[table_rows[jnp.maximum(before, 0)]]
    column = jnp.arange(width, dtype=jnp.int32)
    num_pages = jnp.min(jnp.where(same, width, column[None, :]), axis=1)
    # Every query of both sees what lies before its sequence's first one.
    seen_by_both = jnp.minimum(first_place, first_place[jnp.maximum(before, 0)])
    link = jnp.where(asks & (before >= 0), jnp.minimum(num_pages * page_size, seen_by_both), 0)
    others = jnp.maximum(link[jnp.maximum(before, 0)], link.at[after].get(mode="fill", fill_value=0))
    joins = (link >= unit) & (2 * link >= others)

    # A run holds what lies between its sequences too; the first also what lies before it.
    begins = asks & ~joins
    run = jnp.maximum(jnp.cumsum(begins, dtype=jnp.int32) - 1, 0)
    starts = jnp.full(num_seqs + 1, query_starts[-1], jnp.int32)
    starts = starts.at[jnp.where(begins, run, num_seqs + 1)].set(query_starts[:-1], mode="drop")
    starts = starts.at[0].set(0)
    rows = jnp.zeros(num_seqs, jnp.int32).at[jnp.where(begins, run, num_seqs)].set(table_rows, mode="drop")
    members = jnp.zeros(num_seqs, jnp.int32).at[run].add(asks.astype(jnp.int32))
    most = jnp.iinfo(jnp.int32).max
    shared = jnp.full(num_seqs, most, jnp.int32).at[run].min(jnp.where(joins, link, most))
    shared = jnp.where(members > 1, shared // unit * unit, 0)
    saved = (members - 1).astype(jnp.float32) * shared.astype(jnp.float32) * token_bytes
    spent = (starts[1:] - starts[:-1]).astype(jnp.float32) * (2 * partial_bytes)
    shared = jnp.where(saved > spent, shared, 0)
    return Prefixes(rows, starts, shared, jnp.where(asks, shared[run], 0))
