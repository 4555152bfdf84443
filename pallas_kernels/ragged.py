"""Maps work of uneven length to one static axis of rows."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def ragged_rows(
    ends: Int[Array, " entries"], count: int, first: int | Int[Array, ""] = 0
) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """The entry of each flat row, and the row's index within the entry.

        counts   2     0  3           ends = cumsum(counts) = 2, 2, 5
        rows     0  1     2  3  4     5  6
        entry    0  0     2  2  2     3  3     3 = number of entries: past the end
        index    0  1     0  1  2     0  1

    Adds one at each end and takes the running sum, which is cheaper than a search for each row.

    Args:
      ends: inclusive running sum of the entries' counts.
      count: number of rows, static.
      first: the first row.

    Returns:
      `(entry, index)`, int32; `entry` is `len(ends)` for a row past the last end.
    """
    passed_at = jnp.maximum(ends - first, 0)
    passed = jnp.zeros(count, jnp.int32).at[passed_at].add(1, mode="drop", wrap_negative_indices=False)
    entry = jnp.cumsum(passed, dtype=jnp.int32)
    # The first entry starts at 0, which is read for an index of -1.
    start = ends.at[entry - 1].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return entry, first + jnp.arange(count, dtype=jnp.int32) - start
