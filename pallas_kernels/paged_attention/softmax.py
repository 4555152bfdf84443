"""The online softmax (Milakov and Gimelshein, arXiv:1805.02867), as pure functions.

A partial result is `(m, l, o)`: the largest score so far, before its scale, the sum of
`exp((score - m) * scale)`, and the sum of `exp((score - m) * scale) * v`. A row without scores is
`(LOWEST, 0, 0)`. A score of -inf, from a product that overflows, has weight zero; a row with no other scores
counts as a row without scores.

With `exp=jnp.exp2`, which is one instruction on a GPU, `scale` includes the factor log2(e).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# The largest score of a row without scores: finite, so that `-inf - LOWEST` is not NaN, and not above any
# finite score.
LOWEST = float(np.finfo(np.float32).min)


class Partial(NamedTuple):
    """Attention over some of a row's keys, not yet normalized; float32.

    `o` may be a tuple of arrays, each with some elements of a head.
    """

    m: Float[Array, "*rows"]
    l: Float[Array, "*rows"]  # noqa: E741
    o: Any


def empty(rows: tuple[int, ...], head_dim: int) -> Partial:
    """The partial result of rows without scores."""
    return Partial(
        m=jnp.full(rows, LOWEST, jnp.float32),
        l=jnp.zeros(rows, jnp.float32),
        o=jnp.zeros((*rows, head_dim), jnp.float32),
    )


def extend(
    seen: Partial,
    scores: Float[Array, "*rows tokens"],
    visible: Bool[Array, "*#rows tokens"] | None,
    v: Any,
    *,
    scale: float = 1.0,
    product: Callable[[Array, Any], Any],
    exp: Callable[[Array], Array] = jnp.exp,
) -> Partial:
    """Adds one more tile of keys to partial results.

    Args:
      seen: the partial results.
      scores: of the tile's keys.
      visible: which of them each row attends to; None for all.
      v: the tile's values, or codes; they must be finite at masked tokens too.
      scale: of the scores; positive.
      product: of `p [*rows, tokens]` and `v`, in the form of `seen.o`.
    """
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    m = jnp.maximum(seen.m, jnp.max(scores, axis=-1))
    p = exp((scores - m[..., None]) * scale)
    if visible is not None:
        # Masked weights are zero already, but without this Triton's compiler spills registers.
        p = jnp.where(visible, p, 0.0)
    rescale = exp((seen.m - m) * scale)
    return Partial(
        m=m,
        l=seen.l * rescale + jnp.sum(p, axis=-1),
        o=jax.tree.map(lambda o, more: o * rescale[..., None] + more, seen.o, product(p, v)),
    )


def merge(
    one: Partial, other: Partial, *, scale: float = 1.0, exp: Callable[[Array], Array] = jnp.exp
) -> Partial:
    """Merges partial results over two disjoint sets of keys."""
    m = jnp.maximum(one.m, other.m)
    weight, other_weight = exp((one.m - m) * scale), exp((other.m - m) * scale)
    return Partial(
        m=m,
        l=one.l * weight + other.l * other_weight,
        o=jax.tree.map(lambda a, b: a * weight[..., None] + b * other_weight[..., None], one.o, other.o),
    )


def finish(
    seen: Partial,
    sinks: Float[Array, "*rows"] | None,
    *,
    scale: float = 1.0,
    exp: Callable[[Array], Array] = jnp.exp,
    log: Callable[[Array], Array] = jnp.log,
) -> tuple[Any, Array]:
    """The output and the log-sum-exp of complete rows; zero and -inf for rows without scores.

    Here `exp` and `log` are natural, so `scale` excludes the factor log2(e).
    """
    m, l, o = seen  # noqa: E741
    if scale != 1:
        # With a scale above 1, LOWEST becomes -inf, and -inf minus a sink of -inf is NaN.
        m = jnp.maximum(m * scale, LOWEST)
    some = l > 0
    if sinks is not None:
        top, start = jnp.maximum(m, sinks), m
        l = l * exp(m - top) + exp(sinks - top)  # noqa: E741
        o = jax.tree.map(lambda part: part * exp(start - top)[..., None], o)
        m = top
    l = jnp.where(some, l, 1.0)  # noqa: E741
    return jax.tree.map(lambda part: part / l[..., None], o), jnp.where(some, m + log(l), -jnp.inf)
