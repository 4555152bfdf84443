"""Sampling: which tokens may be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.sampling import GREEDY, Sampling, sample

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.07, 0.03]]))


def draw(sampling: Sampling, count: int = 4000) -> np.ndarray:
    """Shares of each token among many draws."""
    tokens = sample(jax.random.key(7), jnp.tile(LOGITS, (count, 1)), sampling)
    return np.bincount(np.asarray(tokens), minlength=5) / count


def test_greedy_takes_the_likeliest_and_needs_no_temperature():
    assert draw(GREEDY, 10).tolist() == [1, 0, 0, 0, 0]


def test_temperature_one_draws_by_the_model_s_own_probabilities():
    np.testing.assert_allclose(draw(Sampling(temperature=1.0)), np.exp(LOGITS[0]), atol=0.03)


def test_a_low_temperature_sharpens():
    assert draw(Sampling(temperature=0.25))[0] > 0.9


def test_top_k_keeps_k_tokens_in_proportion():
    shares = draw(Sampling(temperature=1.0, top_k=2))
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 0, 0, 0], atol=0.03)


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert (draw(Sampling(temperature=1.0, top_k=99)) > 0).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.76, 3), (1.0, 5)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    shares = draw(Sampling(temperature=1.0, top_p=top_p))
    assert (shares > 0).tolist() == [i < kept for i in range(5)]


@pytest.mark.parametrize(
    "bad",
    [dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)],
)
def test_bad_settings_are_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        Sampling(**bad)
