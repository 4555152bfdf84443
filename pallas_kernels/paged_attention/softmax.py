"""The online softmax (Milakov and Gimelshein, arXiv:1805.02867), as pure functions.

A partial result is `(m, l, o)`: the greatest score seen, the sum of `exp(score - m)`, and the sum
of `exp(score - m) * v`. A row that has seen nothing is `(LOWEST, 0, 0)`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Stands for minus infinity where a difference of two of them must not be NaN.
LOWEST = -1e30


class Partial(NamedTuple):
    """Attention over some of a row's tokens, not yet normalized; float32."""

    m: Float[Array, "*rows"]
    l: Float[Array, "*rows"]  # noqa: E741
    o: Float[Array, "*rows head_dim"]


def empty(rows: tuple[int, ...], head_dim: int) -> Partial:
    """Rows that have seen nothing."""
    return Partial(
        m=jnp.full(rows, LOWEST, jnp.float32),
        l=jnp.zeros(rows, jnp.float32),
        o=jnp.zeros((*rows, head_dim), jnp.float32),
    )


def extend(
    seen: Partial,
    scores: Float[Array, "heads rows tokens"],
    visible: Bool[Array, "#heads rows tokens"],
    v: Float[Array, "heads tokens head_dim"],
) -> Partial:
    """Lets rows see one more tile of tokens. What `v` holds at tokens nobody sees must be finite."""
    m = jnp.maximum(seen.m, jnp.max(jnp.where(visible, scores, LOWEST), axis=-1))
    p = jnp.where(visible, jnp.exp(scores - m[..., None]), 0.0)
    rescale = jnp.exp(seen.m - m)
    return Partial(
        m=m,
        l=seen.l * rescale + jnp.sum(p, axis=-1),
        o=seen.o * rescale[..., None] + jnp.einsum("hrt,htd->hrd", p, v, precision="highest"),
    )


def finish(seen: Partial, sinks: Float[Array, "*rows"] | None) -> tuple[Array, Array]:
    """The output and the log-sum-exp of rows that have seen all; zero and -inf where that is nothing."""
    m, l, o = seen  # noqa: E741
    some = l > 0
    if sinks is not None:
        top = jnp.maximum(m, sinks)
        l = l * jnp.exp(m - top) + jnp.exp(sinks - top)  # noqa: E741
        o = o * jnp.exp(m - top)[..., None]
        m = top
    l = jnp.where(some, l, 1.0)  # noqa: E741
    return o / l[..., None], jnp.where(some, m + jnp.log(l), -jnp.inf)
