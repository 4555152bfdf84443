"""Rotary positions against the definition in complex numbers, and the two pairings against each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.rope import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    Rope,
    inverse_frequencies,
    rotate,
)


def turned_by_definition(x, positions, frequencies):
    """Interleaved pairs as complex numbers, times `exp(i position frequency)`, in float64."""
    pairs = x[..., 0::2].astype(np.float64) + 1j * x[..., 1::2]
    turned = pairs * np.exp(1j * positions[:, None, None] * frequencies.astype(np.float64))
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return rng.standard_normal((5, 3, 16), dtype=np.float32), np.asarray([0, 1, 2, 700, 8191])


def test_interleaved_pairs_turn_like_complex_numbers(features):
    x, positions = features
    frequencies = inverse_frequencies(16, 10000.0, None)
    got = rotate(jnp.asarray(x), jnp.asarray(positions), frequencies, "interleaved")
    # A float32 angle of 8191 radians is off by up to 5e-4.
    np.testing.assert_allclose(got, turned_by_definition(x, positions, frequencies), atol=2e-3)
    np.testing.assert_allclose(got[:3], turned_by_definition(x, positions, frequencies)[:3], atol=1e-6)


def test_half_is_interleaved_with_the_features_in_another_order(features):
    x, positions = features
    frequencies = inverse_frequencies(16, 10000.0, None)
    order = np.arange(16).reshape(2, 8).T.reshape(-1)
    half = rotate(jnp.asarray(x), jnp.asarray(positions), frequencies, "half")
    interleaved = rotate(jnp.asarray(x[..., order]), jnp.asarray(positions), frequencies, "interleaved")
    np.testing.assert_array_equal(half[..., order], interleaved)


def test_position_zero_turns_nothing_and_the_dtype_is_kept(features):
    x = jnp.asarray(features[0], jnp.bfloat16)
    got = rotate(x, jnp.zeros(5, jnp.int32), inverse_frequencies(16, 10000.0, None), "half")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), x.astype(jnp.float32))


def test_scaling_divides_frequencies():
    plain = inverse_frequencies(128, 500000.0, None)
    np.testing.assert_allclose(inverse_frequencies(128, 500000.0, LinearScaling(factor=4.0)), plain / 4)
    llama3 = inverse_frequencies(
        128,
        500000.0,
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
    )
    ratio = plain / llama3
    assert ratio[0] == pytest.approx(1.0) and ratio[-1] == pytest.approx(8.0)
    assert np.all(np.diff(ratio) >= -1e-5)
    listed = inverse_frequencies(128, 500000.0, FrequencyFactors(factors=tuple(ratio.tolist())))
    np.testing.assert_allclose(listed, llama3, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(head_dim=7), "head_dim=7 must be an even number"),
        (dict(head_dim=0), "head_dim=0 must be an even number"),
        (
            dict(head_dim=8, scaling={"rope_type": "llama3"}),
            "must be one of jaxkv.rope's LinearScaling, Llama3",
        ),
        (dict(head_dim=8, scaling=LinearScaling(factor=-1.0)), "factor must be positive"),
    ],
)
def test_a_rope_of_wrong_values_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        Rope.of(theta=10_000.0, **options)


@pytest.mark.parametrize("shape", [(2, 8), (2, 1, 6), (3, 1, 8)])
def test_rotate_refuses_other_shapes(shape):
    with pytest.raises(
        ValueError, match=r"x must be \[tokens, heads, head_dim\], of at least the 8 features"
    ):
        Rope.of(head_dim=8, theta=10_000.0).rotate(jnp.ones(shape), jnp.arange(2))
