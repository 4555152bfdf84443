"""Flat indices over ragged rows: the one way work of uneven length becomes one static axis."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def ragged_rows(
    ends: Int[Array, " entries"], count: int, first: int | Int[Array, ""] = 0
) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """The entry each flat row belongs to, and its place within the entry.

        counts   2     0  3           ends = cumsum(counts) = 2, 2, 5
        rows     0  1     2  3  4     5  6
        entry    0  0     2  2  2     3  3     number of entries: past the end
        place    0  1     0  1  2     0  1

    Each end adds one where it lies, and a running sum counts them: cheaper than a search for each row.

    Args:
      ends: inclusive running sum of the entries' counts.
      count: rows, static.
      first: the first row's number.

    Returns:
      `(entry, place)`, int32; `entry` is `len(ends)` for a row past the last end.
    """
    passed = jnp.zeros(count, jnp.int32).at[jnp.maximum(ends - first, 0)].add(1, mode="drop")
    entry = jnp.cumsum(passed, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])
    return entry, first + jnp.arange(count, dtype=jnp.int32) - starts[entry]
