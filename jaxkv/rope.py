"""Rotary position embedding (RoFormer, arXiv:2104.09864).

Each pair of features of a query or key is rotated by an angle: the token's position times the pair's
frequency. Checkpoints differ in which features form a pair, and in how frequencies are scaled for contexts
longer than the trained one.
"""

import dataclasses
import math
from typing import Literal, assert_never, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxkv.arguments import real, whole

RopePairing = Literal["half", "interleaved"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Divides every frequency by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling: divides low frequencies by `factor`, keeps high ones, interpolates between.

    A frequency is low if its wavelength exceeds `original_max_position / low_freq_factor` tokens, high if it
    is below `original_max_position / high_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrequencyFactors:
    """One divisor per frequency, `head_dim / 2` in all, as in GGUF files of Llama 3.1."""

    factors: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DynamicScaling:
    """A larger base for texts of more than `original_max_position` tokens ("dynamic NTK").

    The base follows from the length of the text, so a longer text rotates its first keys differently too. A
    cache holds rotated keys: all have the frequencies of a text of the longest context. Up to
    `original_max_position` nothing is scaled; beyond, `transformers` agrees at that one length.
    """

    factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): keeps high frequencies, divides low ones by `factor`, interpolates between.

    Attributes:
      factor: divides the low frequencies.
      original_max_position: tokens of the originally trained context.
      beta_fast: a frequency of more full rotations in the trained context is high.
      beta_slow: one of fewer is low.
      truncate: whether the pairs of those two are rounded to whole ones.
      magnitude: factor of the rotated features.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (arXiv:2402.13753): one divisor per frequency, others for texts beyond the trained context.

    `transformers` divides by `long_factors` once a text has more than `original_max_position` tokens, and
    then computes all its keys anew. A cache holds rotated keys, so one of the two must serve a whole text:
    `long_factors` if the longest context exceeds `original_max_position`, as in vLLM. Texts that stay within
    it are then rotated differently from `transformers`; a model loaded for no longer contexts
    (`load(..., max_context=...)`) has `short_factors`.

    Attributes:
      short_factors: divisors for contexts of at most `original_max_position` tokens.
      long_factors: divisors for longer ones.
      original_max_position: tokens of the originally trained context.
      magnitude: factor of the rotated features.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position: int
    magnitude: float = 1.0


RopeScaling = (
    LinearScaling | Llama3Scaling | FrequencyFactors | DynamicScaling | YarnScaling | LongRopeScaling
)


def check_scaling(scaling: RopeScaling, features: int) -> None:
    """Raises `ValueError` for values that are invalid for `features` rotated features, naming the field."""
    for field in dataclasses.fields(scaling):
        values = getattr(scaling, field.name)
        if isinstance(values, tuple) and len(values) != features // 2:
            raise ValueError(f"rope_scaling needs {features // 2} {field.name}, not {len(values)}")
        for value in values if isinstance(values, tuple) else (values,):
            if not isinstance(value, bool) and not 0.0 < value < math.inf:
                raise ValueError(f"rope_scaling's {field.name} must be positive, not {value!r}")
    if isinstance(scaling, DynamicScaling) and features < 4:
        raise ValueError(f"rope_scaling 'dynamic' needs 4 rotated features or more, not {features}")
    if isinstance(scaling, Llama3Scaling) and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError(
            f"rope_scaling's low_freq_factor must be below its high_freq_factor "
            f"({scaling.high_freq_factor}), not {scaling.low_freq_factor}"
        )


def inverse_frequencies(
    features: int, theta: float, scaling: RopeScaling | None, max_context: int | None = None
) -> np.ndarray:
    """The angle in radians by which each feature pair is rotated per position.

    Args:
      features: rotated features of one head; even.
      theta: the base of the geometric series, 10000 in the paper.
      scaling: how the frequencies are scaled, or None.
      max_context: tokens of the longest context, which some scalings depend on; None is the original one.

    Returns:
      float32 `[features / 2]`, a NumPy constant.
    """
    exponents = np.arange(0, features, 2, dtype=np.float64) / features
    frequencies = theta**-exponents
    match scaling:
        case None:
            pass
        case LinearScaling():
            frequencies = frequencies / scaling.factor
        case Llama3Scaling():
            frequencies = _llama3(frequencies, scaling)
        case FrequencyFactors():
            frequencies = frequencies / np.asarray(scaling.factors, np.float64)
        case DynamicScaling():
            frequencies = _dynamic_base(features, theta, scaling, max_context or 0) ** -exponents
        case YarnScaling():
            frequencies = _yarn(frequencies, theta, scaling)
        case LongRopeScaling():
            short = (max_context or 0) <= scaling.original_max_position
            factors = scaling.short_factors if short else scaling.long_factors
            frequencies = frequencies / np.asarray(factors, np.float64)
        case _:
            assert_never(scaling)
    return frequencies.astype(np.float32)


def _dynamic_base(features: int, theta: float, scaling: DynamicScaling, context: int) -> float:
    longer = max(context / scaling.original_max_position, 1.0)
    stretch = scaling.factor * longer - (scaling.factor - 1.0)
    return theta * stretch ** (features / (features - 2))


def _yarn(frequencies: np.ndarray, theta: float, scaling: YarnScaling) -> np.ndarray:
    pairs = len(frequencies)

    def pair_of(rotations: float) -> float:
        # The pair that makes so many full rotations within the originally trained context.
        wavelength = scaling.original_max_position / (rotations * 2 * math.pi)
        return pairs * math.log(wavelength) / math.log(theta)

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    span = last - first or 0.001
    divided = np.clip((np.arange(pairs) - first) / span, 0.0, 1.0)
    return divided * frequencies / scaling.factor + (1.0 - divided) * frequencies


def _llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    # Full rotations of a pair within the originally trained context.
    rotations = scaling.original_max_position * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def rotate(
    x: Float[Array, "tokens heads head_dim"],
    positions: Int[Array, " tokens"],
    frequencies: np.ndarray,
    pairing: RopePairing,
    magnitude: float = 1.0,
) -> Float[Array, "tokens heads head_dim"]:
    """Rotates every feature pair of `x` by the token's position times the pair's frequency.

    Args:
      x: queries or keys.
      positions: of each token, from 0.
      frequencies: float32 `[head_dim / 2]`, radians per position; fewer rotate only the first features.
      pairing: `"half"` pairs feature `i` with `i + head_dim / 2` (Hugging Face checkpoints),
          `"interleaved"` pairs `2 i` with `2 i + 1` (the paper, and Llama in GGUF files); of fewer
          frequencies, within the rotated features.
      magnitude: factor of the rotated features.

    Returns:
      The rotated features, in `x`'s dtype; the angles are computed in float32.
    """
    return _rotate_by(x, positions[:, None], frequencies, pairing, magnitude)


def _rotate_by(
    x: Array, by: Array, frequencies: np.ndarray, pairing: RopePairing, magnitude: float = 1.0
) -> Array:
    """`x [..., features]` rotated by `by [...]` positions."""
    features = 2 * frequencies.size
    angles = by.astype(jnp.float32)[..., None] * frequencies.reshape(*(1,) * by.ndim, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    wide = x[..., :features].astype(jnp.float32)
    if pairing == "half":
        first, second = jnp.split(wide, 2, axis=-1)
    else:
        first, second = wide[..., 0::2], wide[..., 1::2]
    rotated = first * cos - second * sin, second * cos + first * sin
    if pairing == "half":
        out = jnp.concatenate(rotated, axis=-1)
    else:
        out = jnp.stack(rotated, axis=-1).reshape(wide.shape)
    out = out.astype(x.dtype)
    return out if features == x.shape[-1] else jnp.concatenate([out, x[..., features:]], axis=-1)


@dataclasses.dataclass(frozen=True, slots=True)
class Rope:
    """How a model rotates queries and keys; hashable. `shift_positions` moves keys in a cache with it.

    Attributes:
      frequencies: radians per position of each feature pair, `head_dim / 2` of them; fewer if the model
        rotates only the first features of a head.
      pairing: as for `rotate`.
      magnitude: factor of the rotated features; keys in a cache have it already.

    Raises:
      ValueError: for no frequencies, one that is not finite, an unknown pairing, or a magnitude that is not
        a positive number.

    Example:
      >>> Rope.of(head_dim=4, theta=10000.0)
      Rope(frequencies=(1.0, 0.009999999776482582), pairing='half', magnitude=1.0)
    """

    frequencies: tuple[float, ...]
    pairing: RopePairing = "half"
    magnitude: float = 1.0

    def __post_init__(self):
        values = tuple(map(real, self.frequencies)) if isinstance(self.frequencies, tuple) else ()
        if not values or not all(value is not None and math.isfinite(value) for value in values):
            raise ValueError(f"frequencies={self.frequencies!r} must be a tuple of finite floats")
        object.__setattr__(self, "frequencies", values)
        if self.pairing not in get_args(RopePairing):
            raise ValueError(f"pairing={self.pairing!r} must be 'half' or 'interleaved'")
        magnitude = real(self.magnitude)
        if magnitude is None or not 0.0 < magnitude < math.inf:
            raise ValueError(f"magnitude={self.magnitude!r} must be a positive number")
        object.__setattr__(self, "magnitude", magnitude)

    @classmethod
    def of(
        cls,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None = None,
        pairing: RopePairing = "half",
        max_context: int | None = None,
    ) -> "Rope":
        """From the values of a model's configuration; see `inverse_frequencies`.

        Args:
          head_dim: features of one head, or as many as the model rotates.
          theta, scaling, max_context: as for `inverse_frequencies`.
          pairing: as for `rotate`.
        """
        if (features := whole(head_dim)) is None or features < 2 or features % 2:
            raise ValueError(f"head_dim={head_dim!r} must be an even number of features, 2 or more")
        if scaling is not None:
            if not isinstance(scaling, RopeScaling):
                kinds = ", ".join(kind.__name__ for kind in get_args(RopeScaling))
                raise ValueError(f"scaling={scaling!r:.200} must be one of jaxkv.rope's {kinds}")
            check_scaling(scaling, features)
        frequencies = inverse_frequencies(features, theta, scaling, max_context)
        return cls(tuple(frequencies.tolist()), pairing, getattr(scaling, "magnitude", 1.0))

    def rotate(
        self, x: Float[Array, "tokens heads head_dim"], positions: Int[Array, " tokens"]
    ) -> Float[Array, "tokens heads head_dim"]:
        """Queries or keys rotated by their positions, as a model does before `append` and `attend`.

        Args:
          x: queries or keys.
          positions: of each token, such as `batch.positions`.

        Example:
          >>> import jax.numpy as jnp
          >>> rope = Rope.of(head_dim=2, theta=10000.0)
          >>> [round(float(x), 2) for x in rope.rotate(jnp.array([[[1.0, 0.0]]]), jnp.array([1]))[0, 0]]
          [0.54, 0.84]
        """
        x, positions, features = jnp.asarray(x), jnp.asarray(positions), 2 * len(self.frequencies)
        if x.ndim != 3 or x.shape[2] < features or positions.shape != x.shape[:1]:
            raise ValueError(
                f"x must be [tokens, heads, head_dim], of at least the {features} features that are rotated, "
                f"and positions [tokens], not {list(x.shape)} and {list(positions.shape)}"
            )
        return rotate(x, positions, np.asarray(self.frequencies, np.float32), self.pairing, self.magnitude)

    def shift(
        self, keys: Float[Array, "*tokens head_dim"], by: Int[Array, "*#tokens"]
    ) -> Float[Array, "*tokens head_dim"]:
        """Rotated keys, rotated on to positions that are larger by `by`."""
        return _rotate_by(keys, by, np.asarray(self.frequencies, np.float32), self.pairing)
