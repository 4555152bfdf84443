"""Norms of the rows of an array."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*rows features"], weight: Float[Array, " features"], eps: float
) -> Float[Array, "*rows features"]:
    """Scales each row to a root mean square of one, then each feature by `weight`."""
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale * weight.reshape(*(1,) * (x.ndim - 1), -1)


def layer_norm(
    x: Float[Array, "*rows features"],
    weight: Float[Array, " features"],
    eps: float,
    bias: Float[Array, " features"] | None = None,
) -> Float[Array, "*rows features"]:
    """Shifts each row to a mean of zero, then as `rms_norm`, and adds `bias`."""
    normed = rms_norm(x - jnp.mean(x, axis=-1, keepdims=True), weight, eps)
    return normed if bias is None else normed + bias.reshape(*(1,) * (x.ndim - 1), -1)
