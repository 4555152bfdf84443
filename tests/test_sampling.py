"""Sampling: which tokens may be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.sampling import GREEDY, Sampling, SamplingBatch, sample, sample_each

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.07, 0.03]]))


@pytest.fixture(autouse=True)
def no_implicit_broadcast():
    with jax.numpy_rank_promotion("raise"):
        yield


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
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(temperature=True),
        dict(temperature=np.bool_(True)),
        dict(temperature="0.5"),
        dict(temperature=np.ones(1)),
        dict(top_k=0),
        dict(top_k=True),
        dict(top_k=2.0),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(top_p=np.True_),
    ],
)
def test_bad_settings_are_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        Sampling(**bad)


def shares_by_numpy(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities, in plain float64: sort by logit and then by index, keep, renormalize."""
    p = np.exp((logits - logits.max()) / np.float64(sampling.temperature))
    kept = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: sampling.top_k]
    if sampling.top_p is not None:
        before = np.cumsum([0.0, *p[kept][:-1]]) / p[kept].sum()
        kept = [token for nth, token in enumerate(kept) if nth == 0 or before[nth] < sampling.top_p]
    shares = np.zeros_like(p)
    shares[kept] = p[kept]
    return shares / shares.sum()


TIED = np.log(np.array([0.4, 0.2, 0.2, 0.2], np.float32))
NINE = np.array([0.5, -1.0, 2.0, 0.5, 2.0, -np.inf, 0.5, 1.0, -3.0], np.float32)
CASES = {
    "two of the tied reach half": (TIED, dict(top_p=0.5)),
    "three of the tied reach seven tenths": (TIED, dict(top_p=0.7)),
    "two of the tied by number": (TIED, dict(top_k=2)),
    "all equal, one": (np.zeros(9, np.float32), dict(top_k=1)),
    "all equal, four": (np.zeros(9, np.float32), dict(top_p=0.4)),
    "ties cut twice": (NINE, dict(top_k=4, top_p=0.8)),
    "ties at a high temperature": (NINE, dict(temperature=3.0, top_k=5)),
    "ties at a low temperature": (NINE, dict(temperature=0.3, top_p=0.99)),
    "an impossible token": (NINE, dict(top_k=9)),
    "nothing is possible": (np.full(9, -np.inf, np.float32), dict()),
}


@pytest.mark.parametrize("name", CASES)
def test_top_k_and_top_p_keep_what_sorting_by_logit_and_index_keeps(name):
    logits, settings = CASES[name]
    sampling, count = Sampling(**{"temperature": 1.0, **settings}), 4000
    if name == "nothing is possible":
        want = np.full(9, 1 / 9)
    else:
        want = shares_by_numpy(logits.astype(np.float64), sampling)
    rows = jnp.tile(jnp.asarray(logits), (count, 1))
    shares = np.bincount(sample(jax.random.key(7), rows, sampling), minlength=len(want)) / count
    assert (shares > 0).tolist() == (want > 0).tolist()
    np.testing.assert_allclose(shares, want, atol=0.03)


RANDOM = jax.random.normal(jax.random.key(1), (64, 50)).round(1) * 4


@pytest.mark.parametrize("temperature", [1e-38, 5e-324, 1e-300, np.float32(1e-45), 2.0**-126, 1e-30])
def test_the_smallest_temperatures_are_greedy(temperature):
    distinct = RANDOM + jnp.arange(50, dtype=jnp.float32)[None] * 1e-3
    for logits in (distinct, distinct * 1e30):
        tokens = sample(jax.random.key(0), logits, Sampling(temperature=temperature))
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))


@pytest.mark.parametrize("top_p", [1e-46, 5e-324, 1e-38, 1e-8])
def test_the_smallest_top_p_is_greedy(top_p):
    tokens = sample(jax.random.key(0), RANDOM, Sampling(temperature=1.0, top_p=top_p))
    np.testing.assert_array_equal(tokens, np.argmax(RANDOM, axis=1))


@pytest.mark.parametrize("temperature", [1e38, 3e38, 1e300])
def test_the_largest_temperatures_draw_every_possible_token_alike(temperature):
    rows = jnp.tile(jnp.asarray(NINE), (4000, 1))
    tokens = sample(jax.random.key(7), rows, Sampling(temperature=temperature))
    shares = np.bincount(tokens, minlength=9) / 4000
    np.testing.assert_allclose(shares, np.where(np.isneginf(NINE), 0, 1 / 8), atol=0.03)


@pytest.mark.parametrize(
    "all_of", [dict(top_p=1.0), dict(top_p=np.float32(1)), dict(top_k=50), dict(top_k=2**40)]
)
def test_keeping_all_changes_no_draw(all_of):
    for seed in range(4):
        key = jax.random.key(seed)
        want = sample(key, RANDOM, Sampling(temperature=0.7))
        np.testing.assert_array_equal(sample(key, RANDOM, Sampling(temperature=0.7, **all_of)), want)


SETTINGS = [
    GREEDY,
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=3),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=2.0, top_k=9, top_p=0.9),
    Sampling(temperature=1e-39, top_k=2),
    Sampling(temperature=1e300),
    Sampling(temperature=1.0, top_p=1e-46),
]


def test_a_sequence_draws_what_it_would_draw_among_its_like():
    """Each row with a key of its own, and settings of its own, or the settings of all."""
    keys = jax.random.split(jax.random.key(5), 64)
    settings = [SETTINGS[row % 8] for row in range(64)]
    together = jax.jit(sample_each)(keys, RANDOM, SamplingBatch.of(settings))
    for nth, one in enumerate(SETTINGS):
        alike = jax.jit(sample_each)(keys, RANDOM, SamplingBatch.of([one] * 64))
        np.testing.assert_array_equal(together[nth::8], alike[nth::8])


def test_the_vocabulary_is_sorted_only_for_top_k_and_top_p():
    def sorts(settings):
        drawing = jax.make_jaxpr(sample)(jax.random.key(0), RANDOM, SamplingBatch.of(settings))
        return any(name in str(drawing) for name in ("sort", "top_k"))

    assert not sorts([SETTINGS[0], SETTINGS[1]] * 32)
    assert not sorts([Sampling(temperature=1.0, top_p=1.0)] * 64)
    assert not sorts([Sampling(top_p=0.5), SETTINGS[1]] * 32)
    assert sorts([SETTINGS[0], SETTINGS[2]] * 32)


def test_numpy_numbers_are_settings_like_python_s_own():
    given = Sampling(temperature=np.float32(0.5), top_k=np.int64(7), top_p=jnp.float32(0.25))
    assert given == Sampling(temperature=0.5, top_k=7, top_p=0.25)
    assert hash(given) == hash(Sampling(temperature=0.5, top_k=7, top_p=0.25))


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=0.4)]
)
def test_zero_and_minus_zero_are_equal_logits(sampling):
    logits = jnp.array([[-0.0, 0.0, -5.0]])
    keys = jax.random.split(jax.random.key(0), 60)
    drawn = jax.vmap(lambda key: sample(key, logits, sampling)[0])(keys)
    assert set(drawn.tolist()) == {0}
