"""Flat indices over ragged rows: the one way work of uneven length becomes one static axis."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def ragged_rows(
    ends: Int[Array, " entries"], rows: Int[Array, " rows"]
) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """The entry each flat row belongs to, and its place within the entry.

        counts   2     0  3           ends = cumsum(counts) = 2, 2, 5
        rows     0  1     2  3  4     5  6
        entry    0  0     2  2  2     3  3     number of entries: past the end
        place    0  1     0  1  2     0  1

    Args:
      ends: inclusive running sum of the entries' counts.
      rows: flat row numbers, none negative.

    Returns:
      `(entry, place)`, int32; `entry` is `len(ends)` for a row past the last end.
    """
    entry = jnp.searchsorted(ends, rows, side="right", method="scan_unrolled").astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])
    return entry, rows - starts[entry]
