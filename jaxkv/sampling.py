"""From logits to the next token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


@jax.tree_util.register_static
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; static.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep this many of the likeliest tokens. None: all.
      top_p: keep the likeliest tokens that together reach this probability (nucleus sampling,
        arXiv:1904.09751). None: all. Applied after `top_k`.

    Raises:
      ValueError: naming the field and what is allowed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        # Written so that NaN is refused too.
        if not (_is_number(self.temperature) and 0 <= self.temperature < float("inf")):
            raise ValueError(f"temperature={self.temperature!r} must be 0 (greedy) or positive")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k={self.top_k!r} must be a positive integer")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p!r} must be above 0 and at most 1")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


GREEDY = Sampling()


def sample(key: PRNGKeyArray, logits: Float[Array, "seqs vocab"], sampling: Sampling) -> Int[Array, " seqs"]:
    """Draws one token a sequence.

    Args:
      key: for the draw; unused when greedy.
      logits: float32.
      sampling: temperature, top-k, top-p.

    Returns:
      Token ids, int32.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> int(sample(jax.random.key(0), jnp.array([[0.0, 3.0, 1.0]]), Sampling())[0])
      1
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p is not None:
        logits = _nucleus(logits, sampling.top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _nucleus(logits: Float[Array, "seqs vocab"], top_p: float) -> Float[Array, "seqs vocab"]:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    p = jax.nn.softmax(ordered, axis=-1)
    # A token stays while those before it have not reached top_p; so the likeliest always does.
    stays = jnp.cumsum(p, axis=-1) - p < top_p
    least = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
