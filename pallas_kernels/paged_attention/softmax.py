"""The online softmax (Milakov and Gimelshein, arXiv:1805.02867), as pure functions.

A partial result is `(m, l, o)`: the greatest score seen, before its scale, the sum of
`exp((score - m) * scale)`, and the sum of `exp((score - m) * scale) * v`. A row that has seen nothing is
`(LOWEST, 0, 0)`. A score of -inf, which a product that overflows gives, has weight zero: a row that sees
nothing else is one that has seen nothing.

With `exp=jnp.exp2`, which is one instruction on a GPU, `scale` holds the factor log2(e) too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# The greatest score of a row that has seen none: finite, so that a score of -inf less it is not NaN, and no
# more than any finite score.
LOWEST = float(np.finfo(np.float32).min)


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
        scores = jnp.where(visible, scores, -jnp.inf)
    m = jnp.maximum(seen.m, jnp.max(scores, axis=-1))
    p = exp((scores - m[..., None]) * scale)
    if visible is not None:
        # It is zero already where this masks; but Triton's compiler spills without.
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
    """What rows have seen in two disjoint sets of tokens."""
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
    """The output and the log-sum-exp of rows that have seen all; zero and -inf where that is nothing.

    `exp` and `log` are natural here, and so `scale` is without log2(e).
    """
    m, l, o = seen  # noqa: E741
    if scale != 1:
        # A scale above one makes LOWEST -inf, and -inf less a sink of -inf is NaN.
        m = jnp.maximum(m * scale, LOWEST)
    some = l > 0
    if sinks is not None:
        top, start = jnp.maximum(m, sinks), m
        l = l * exp(m - top) + exp(sinks - top)  # noqa: E741
        o = jax.tree.map(lambda part: part * exp(start - top)[..., None], o)
        m = top
    l = jnp.where(some, l, 1.0)  # noqa: E741
    return jax.tree.map(lambda part: part / l[..., None], o), jnp.where(some, m + log(l), -jnp.inf)
