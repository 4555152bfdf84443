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

from jaxkv.arguments import real

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


RopeScaling = LinearScaling | Llama3Scaling | FrequencyFactors


def check_scaling(scaling: RopeScaling, head_dim: int) -> None:
    """Raises `ValueError` for invalid values, naming the field."""
    for field in dataclasses.fields(scaling):
        values = getattr(scaling, field.name)
        for value in values if isinstance(values, tuple) else (values,):
            if not 0.0 < value < math.inf:
                raise ValueError(f"rope_scaling's {field.name} must be positive, not {value!r}")
    if isinstance(scaling, FrequencyFactors) and len(scaling.factors) != head_dim // 2:
        raise ValueError(f"rope_scaling needs {head_dim // 2} factors, not {len(scaling.factors)}")
    if isinstance(scaling, Llama3Scaling) and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError(
            f"rope_scaling's low_freq_factor must be below its high_freq_factor "
            f"({scaling.high_freq_factor}), not {scaling.low_freq_factor}"
        )


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """The angle in radians by which each feature pair is rotated per position.

    Args:
      head_dim: features of one head; even.
      theta: the base of the geometric series, 10000 in the paper.
      scaling: how the frequencies are scaled, or None.

    Returns:
      float32 `[head_dim / 2]`, a NumPy constant.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
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
        case _:
            assert_never(scaling)
    return frequencies.astype(np.float32)


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
) -> Float[Array, "tokens heads head_dim"]:
    """Rotates every feature pair of `x` by the token's position times the pair's frequency.

    Args:
      x: queries or keys.
      positions: of each token, from 0.
      frequencies: float32 `[head_dim / 2]`, radians per position.
      pairing: `"half"` pairs feature `i` with `i + head_dim / 2` (Hugging Face checkpoints),
          `"interleaved"` pairs `2 i` with `2 i + 1` (the paper, and Llama in GGUF files).

    Returns:
      The rotated features, in `x`'s dtype; the angles are computed in float32.
    """
    return _rotate_by(x, positions[:, None], frequencies, pairing)


def _rotate_by(x: Array, by: Array, frequencies: np.ndarray, pairing: RopePairing) -> Array:
    """`x [..., features]` rotated by `by [...]` positions."""
    angles = by.astype(jnp.float32)[..., None] * frequencies.reshape(*(1,) * by.ndim, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    wide = x.astype(jnp.float32)
    if pairing == "half":
        first, second = jnp.split(wide, 2, axis=-1)
    else:
        first, second = wide[..., 0::2], wide[..., 1::2]
    rotated = first * cos - second * sin, second * cos + first * sin
    if pairing == "half":
        out = jnp.concatenate(rotated, axis=-1)
    else:
        out = jnp.stack(rotated, axis=-1).reshape(x.shape)
    return out.astype(x.dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class Rope:
    """How a model rotates its keys, for functions that move keys already in a cache; hashable.

    Attributes:
      frequencies: radians per position of each feature pair, `head_dim / 2` of them; fewer if the model
        rotates only the first features of a head.
      pairing: as for `rotate`.

    Raises:
      ValueError: for no frequencies, one that is not finite, or an unknown pairing.

    Example:
      >>> Rope.of(head_dim=4, theta=10000.0)
      Rope(frequencies=(1.0, 0.009999999776482582), pairing='half')
    """

    frequencies: tuple[float, ...]
    pairing: RopePairing = "half"

    def __post_init__(self):
        values = tuple(map(real, self.frequencies)) if isinstance(self.frequencies, tuple) else ()
        if not values or not all(value is not None and math.isfinite(value) for value in values):
            raise ValueError(f"frequencies={self.frequencies!r} must be a tuple of finite floats")
        object.__setattr__(self, "frequencies", values)
        if self.pairing not in get_args(RopePairing):
            raise ValueError(f"pairing={self.pairing!r} must be 'half' or 'interleaved'")

    @classmethod
    def of(
        cls, head_dim: int, theta: float, scaling: RopeScaling | None = None, pairing: RopePairing = "half"
    ) -> "Rope":
        """From the values of a model's configuration; see `inverse_frequencies`."""
        return cls(tuple(inverse_frequencies(head_dim, theta, scaling).tolist()), pairing)

    def turn(
        self, keys: Float[Array, "*tokens head_dim"], by: Int[Array, "*#tokens"]
    ) -> Float[Array, "*tokens head_dim"]:
        """Keys rotated as if their positions were larger by `by`."""
        features = 2 * len(self.frequencies)
        frequencies = np.asarray(self.frequencies, np.float32)
        rotated = _rotate_by(keys[..., :features], by, frequencies, self.pairing)
        return jnp.concatenate([rotated, keys[..., features:]], axis=-1)
