"""Draws the next token from logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxkv.arguments import integer, real
from jaxkv.operation import axis_of, operation
from jaxkv.selection import likeliest

# The smallest normal float32. Division by less may overflow, or be by zero where hardware flushes it to 0.
_LEAST_TEMPERATURE = 2.0**-126
# Its reciprocal. A compiler may multiply by the reciprocal of the divisor, which must be normal too.
_MOST_TEMPERATURE = 2.0**126
# More tokens than any vocabulary.
_ALL = 2**31 - 1


@jax.tree_util.register_static
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; static. The default is greedy, which ignores the other fields.

    `top_k` and `top_p` order the tokens by logit, equal logits by index, and keep the first: for logits
    `log([.4, .2, .2, .2])` a `top_p` of 0.5 keeps two. Values may be NumPy or JAX scalars.

    Attributes:
      temperature: 0 is greedy, as is any value below `2**-126`, the smallest normal float32.
      top_k: keep this many of the most probable tokens. None: all.
      top_p: keep the fewest most probable tokens that together reach this probability, at least one (nucleus
        sampling, arXiv:1904.09751). None or 1: all. Applied after `top_k`.
      min_p: keep the tokens that are at least this many times as probable as the most probable one
        (arXiv:2407.01082). None or 0: all. Applied beside the others, to the probabilities of all tokens.

    Raises:
      ValueError: naming the field and what is allowed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        temperature = real(self.temperature)
        # This form of the comparison also refuses NaN.
        if temperature is None or not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r} must be 0 (greedy) or positive")
        object.__setattr__(self, "temperature", temperature)
        if self.top_k is not None:
            object.__setattr__(self, "top_k", integer("top_k", self.top_k, below=2**63))
        if self.top_p is not None:
            top_p = real(self.top_p)
            if top_p is None or not 0 < top_p <= 1:
                raise ValueError(f"top_p={self.top_p!r} must be above 0 and at most 1")
            object.__setattr__(self, "top_p", top_p)
        if self.min_p is not None:
            min_p = real(self.min_p)
            if min_p is None or not 0 <= min_p <= 1:
                raise ValueError(f"min_p={self.min_p!r} must be from 0 to 1")
            object.__setattr__(self, "min_p", min_p)


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """A `Sampling` for each sequence, as arrays.

    The settings of other sequences do not change which token a sequence draws.

    Attributes:
      temperature: 0 is greedy.
      top_k: the largest int32 keeps all tokens.
      top_p: 1 keeps all tokens.
      min_p: 0 keeps all tokens.
      sorts: whether any sequence uses `top_k` or `top_p`; otherwise the vocabulary is not sorted.
    """

    temperature: Float[Array, " seqs"]
    top_k: Int[Array, " seqs"]
    top_p: Float[Array, " seqs"]
    min_p: Float[Array, " seqs"]
    sorts: bool = field(metadata={"static": True})

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Sampling | SamplingBatch":
        """From one `Sampling` per sequence; returns that `Sampling` itself if all are equal."""
        if all(one == samplings[0] for one in samplings):
            return samplings[0]
        settings = [plain(one) for one in samplings]
        return cls(
            jnp.asarray([one.temperature for one in settings], jnp.float32),
            jnp.asarray([one.top_k for one in settings], jnp.int32),
            jnp.asarray([one.top_p for one in settings], jnp.float32),
            jnp.asarray([one.min_p for one in settings], jnp.float32),
            sorts=any(one.sorts for one in settings),
        )


class PlainSampling(NamedTuple):
    """A `Sampling` rounded to float32, without None; greedy ignores all but the temperature."""

    temperature: float = 0.0
    top_k: int = _ALL
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def sorts(self) -> bool:
        """Whether drawing sorts the vocabulary."""
        return self.top_k < _ALL or self.top_p < 1


def plain(sampling: Sampling) -> PlainSampling:
    """The settings with a value for each."""
    if sampling.temperature < _LEAST_TEMPERATURE:
        return PlainSampling()
    return PlainSampling(
        temperature=min(sampling.temperature, _MOST_TEMPERATURE),
        top_k=_ALL if sampling.top_k is None else min(sampling.top_k, _ALL),
        top_p=1.0 if sampling.top_p is None else float(np.float32(sampling.top_p)),
        min_p=0.0 if sampling.min_p is None else float(np.float32(sampling.min_p)),
    )


def sample(
    key: PRNGKeyArray, logits: Float[Array, "seqs vocab"], sampling: Sampling | SamplingBatch
) -> Int[Array, " seqs"]:
    """Draws one token per sequence.

    Args:
      key: unused when greedy.
      logits: float32.
      sampling: temperature, top-k, top-p, for all sequences or for each.

    Returns:
      Token ids, int32.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> int(sample(jax.random.key(0), jnp.array([[0.0, 3.0, 1.0]]), Sampling())[0])
      1
    """
    return _draw(key, logits, sampling, each=False)


def sample_each(
    keys: PRNGKeyArray, logits: Float[Array, "seqs vocab"], sampling: Sampling | SamplingBatch
) -> Int[Array, " seqs"]:
    """As `sample`, with a key for each sequence, `[seqs]`; draws are independent of other sequences."""
    return _draw(keys, logits, sampling, each=True)


def _draw(keys: Array, logits: Array, sampling: Sampling | SamplingBatch, *, each: bool) -> Array:
    if isinstance(sampling, Sampling):
        return _drawn(keys, logits, None, sampling=sampling, each=each)
    return _drawn(keys, logits, sampling, sampling=GREEDY, each=each)


@operation(results=lambda _, logits, *__: PartitionSpec(axis_of(logits, 0)), static=("sampling", "each"))
def _drawn(
    keys: Array, logits: Array, batch: SamplingBatch | None, *, sampling: Sampling, each: bool
) -> Array:
    draw = jax.vmap(jax.random.categorical) if each else jax.random.categorical
    return _choose(logits, sampling if batch is None else batch, partial(draw, keys))


def _choose(logits: Array, sampling: Sampling | SamplingBatch, draw: Callable[[Array], Array]) -> Array:
    greedy = likeliest(logits)
    logits = logits.astype(jnp.float32)
    # Sorting orders -0 before 0, but the logits are equal.
    logits = jnp.where(logits == 0, 0.0, logits)
    if isinstance(sampling, Sampling):
        settings = plain(sampling)
        if settings.temperature == 0:
            return greedy
        # Hidden from the compiler: division by a constant may round differently from division by an array.
        temperature = jax.lax.optimization_barrier(jnp.float32(settings.temperature))
        scaled = all_scaled = _scale(logits, temperature)
        if settings.top_k < logits.shape[1] or settings.top_p < 1:
            kept = _kept(logits, temperature, settings.top_k, settings.top_p)
            scaled = jnp.where(kept, scaled, -jnp.inf)
        if settings.min_p > 0:
            scaled = jnp.where(_probable(all_scaled, jnp.float32(settings.min_p)), scaled, -jnp.inf)
        return draw(scaled).astype(jnp.int32)
    temperature = jnp.where(sampling.temperature == 0, 1.0, sampling.temperature)[:, None]
    scaled = all_scaled = _scale(logits, temperature)
    if sampling.sorts:
        kept = _kept(logits, temperature, sampling.top_k[:, None], sampling.top_p[:, None])
        scaled = jnp.where(kept, scaled, -jnp.inf)
    scaled = jnp.where(_probable(all_scaled, sampling.min_p[:, None]), scaled, -jnp.inf)
    return jnp.where(sampling.temperature == 0, greedy, draw(scaled).astype(jnp.int32))


def _probable(scaled: Array, min_p: Array) -> Bool[Array, "seqs vocab"]:
    """Which tokens are at least `min_p` times as probable as the most probable, whose scaled logit is 0."""
    return jnp.exp(scaled) >= min_p


def _scale(logits: Float[Array, "seqs vocab"], temperature: Array) -> Float[Array, "seqs vocab"]:
    """`(logits - largest) / temperature`: no division overflows, and the largest stays finite."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits == largest, 0.0, logits - largest) / temperature


def _kept(
    logits: Array, temperature: Array, top_k: int | Array, top_p: float | Array
) -> Bool[Array, "seqs vocab"]:
    """Which tokens are kept: the first of the order by logit, then by index."""
    index = jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32)[None], logits.shape)
    if isinstance(top_k, int) and isinstance(top_p, float) and top_p >= 1:
        last, last_index = (x[:, -1:] for x in jax.lax.top_k(logits, top_k))
    else:
        falling, index_of = jax.lax.sort((-logits, index), dimension=1, is_stable=True, num_keys=1)
        at = _count(_scale(-falling, temperature), index, top_k, top_p) - 1
        last, last_index = (jnp.take_along_axis(x, at, axis=1) for x in (-falling, index_of))
    return (logits > last) | ((logits == last) & (index <= last_index))


def _count(scaled: Array, rank: Array, top_k: int | Array, top_p: float | Array) -> Int[Array, "seqs 1"]:
    """How many of the ordered tokens are kept; at least one."""
    among = rank < top_k
    reached = jnp.cumsum(jax.nn.softmax(jnp.where(among, scaled, -jnp.inf), axis=1), axis=1)
    before = jnp.pad(reached[:, :-1], ((0, 0), (1, 0)))
    # A sum may round to 1 before the last token, so a top_p of 1 ignores the sum.
    stays = among & ((rank == 0) | (before < top_p) | jnp.asarray(top_p >= 1))
    return jnp.sum(stays, axis=1, keepdims=True, dtype=jnp.int32)
