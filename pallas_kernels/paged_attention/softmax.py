"""The online softmax (Milakov and Gimelshein, arXiv:1805.02867), as pure functions.

A partial result is `(m, l, o)`: the greatest score seen, the sum of `exp(score - m)`, and the sum
of `exp(score - m) * v`. A row that has seen nothing is `(LOWEST, 0, 0)`.

With `exp=jnp.exp2`, which is one instruction on a GPU, scores and `m` are in units of log 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Stands for minus infinity where a difference of two of them must not be NaN.
LOWEST = -1e30


class Partial(NamedTuple):
    """Attention over some of a row's tokens, not yet normalized; float32.

    `o` may be a tuple of arrays, each with some of the numbers of a head.
    """

    m: Float[Array, "*rows"]
    l: Float[Array, "*rows"]  # noqa: E741
    o: Any


def empty(rows: tuple[int, ...], head_dim: int) -> Partial:
    """Rows that have seen nothing."""
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
    """Lets rows see one more tile of tokens.

    Args:
      seen: what they saw before.
      scores: of the tile's tokens.
      visible: which of them a row sees; None for all.
      v: the tile's values, or codes; what it holds at tokens nobody sees must be finite.
      scale: of the scores; positive.
      product: of `p [*rows, tokens]` and `v`, as `seen.o` is.
    """
    if visible is not None:
        scores = jnp.where(visible, scores, LOWEST)
    # After the maximum, so that each score takes one multiplication and addition, in one instruction.
    m = jnp.maximum(seen.m, jnp.max(scores, axis=-1) * scale)
    p = exp(scores * scale - m[..., None])
    if visible is not None:
        # A row that has seen nothing yet has `m` at LOWEST too, and exp(0) is one.
        p = jnp.where(visible, p, 0.0)
    rescale = exp(seen.m - m)
    return Partial(
        m=m,
        l=seen.l * rescale + jnp.sum(p, axis=-1),
        o=jax.tree.map(lambda o, more: o * rescale[..., None] + more, seen.o, product(p, v)),
    )


def merge(one: Partial, other: Partial, exp: Callable[[Array], Array] = jnp.exp) -> Partial:
    """What rows have seen in two disjoint sets of tokens."""
    m = jnp.maximum(one.m, other.m)
    weight, other_weight = exp(one.m - m), exp(other.m - m)
    return Partial(
        m=m,
        l=one.l * weight + other.l * other_weight,
        o=jax.tree.map(lambda a, b: a * weight[..., None] + b * other_weight[..., None], one.o, other.o),
    )


def finish(
    seen: Partial,
    sinks: Float[Array, "*rows"] | None,
    exp: Callable[[Array], Array] = jnp.exp,
    log: Callable[[Array], Array] = jnp.log,
) -> tuple[Any, Array]:
    """The output and the log-sum-exp of rows that have seen all; zero and -inf where that is nothing."""
    m, l, o = seen  # noqa: E741
    some = l > 0
    if sinks is not None:
        top = jnp.maximum(m, sinks)
        l = l * exp(m - top) + exp(sinks - top)  # noqa: E741
        o = jax.tree.map(lambda part: part * exp(seen.m - top)[..., None], o)
        m = top
    l = jnp.where(some, l, 1.0)  # noqa: E741
    return jax.tree.map(lambda part: part / l[..., None], o), jnp.where(some, m + log(l), -jnp.inf)
