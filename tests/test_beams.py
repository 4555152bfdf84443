"""Beam search against a plain Python one that recomputes all densely; pages, waiting, what is refused."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Finish
from jaxkv.beam_loop import search, start
from jaxkv.models import dense_logits, random_model
from jaxkv.policies import SlidingWindow
from jaxkv.selection import largest, likeliest
from jaxkv.testing import assert_in_place
from tests import jitted
from tests.plain_beams import ByHand, by_hand
from tests.tiny_model import TINY

PROMPTS = [[1, 2, 3], list(range(4, 15)), [7]]
STOPS, NEW_TOKENS = (42, 53), 10
MODES = (False, True, "never")


@pytest.fixture(scope="module")
def model():
    return random_model(TINY, jax.random.key(2))


def cache_config(**changes) -> jaxkv.CacheConfig:
    sizes = dict(num_pages=32, page_size=4, max_seqs=13, dtype="float32")
    return TINY.cache_config(**{**sizes, **changes})


def log_probs_of(model):
    """Of the token after each of these texts, computed without a cache. One program serves all."""
    dense, known = jax.jit(dense_logits), {}

    def of(texts: list[tuple[int, ...]]) -> np.ndarray:
        new = [text for text in texts if text not in known]
        for first in range(0, len(new), 4):
            some = new[first : first + 4]
            padded, lengths = np.zeros((4, 32), np.int32), np.ones(4, np.int32)
            for row, text in enumerate(some):
                padded[row, : len(text)], lengths[row] = text, len(text)
            logits = np.asarray(dense(model, padded, lengths))[np.arange(4), lengths - 1]
            shifted = logits - logits.max(axis=1, keepdims=True)
            rows = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            known.update(zip(some, rows, strict=False))
        return np.stack([known[text] for text in texts])

    return of


@pytest.fixture(scope="module")
def log_probs(model):
    return log_probs_of(model)


def pages_of(texts, page_size: int) -> int:
    """Different pages of a step's beams, which share what they begin with alike, but not their last page."""
    ends = range(page_size, max(map(len, texts)) + page_size, page_size)
    return len({text[:end] for text in texts for end in ends})


def assert_equal(result: jaxkv.BeamSearch, expected: list[ByHand]):
    assert result.tokens == [one.tokens for one in expected]
    for scores, one in zip(result.scores, expected, strict=True):
        np.testing.assert_allclose(scores, one.scores, atol=1e-5, rtol=0)


def with_free_pages(config: jaxkv.CacheConfig, count: int) -> jaxkv.KVCache:
    """A cache whose last slot has the other pages."""
    most = config.num_pages * config.page_size
    num_tokens = jnp.array([most - count * config.page_size], jnp.int32)
    seqs = jnp.array([config.max_seqs - 1], jnp.int32)
    return jitted.allocate(jitted.init(config), seqs, num_tokens, total_tokens=most)[0]


def assert_released(cache: jaxkv.KVCache, free: int | None = None):
    jaxkv.check_invariants(cache)
    assert int(cache.table.num_free) == (cache.config.num_pages if free is None else free)


expected_of = partial(by_hand, limit=NEW_TOKENS, stops=STOPS)
run = partial(jaxkv.beam_search, max_new_tokens=NEW_TOKENS, stop_tokens=STOPS)


@pytest.mark.parametrize(("width", "page_size"), [(1, 4), (2, 1), (4, 4)])
def test_sequences_and_scores_are_those_of_dense_recomputation(model, log_probs, width, page_size):
    config = cache_config(page_size=page_size, num_pages=128 // page_size)
    ended, lengths = set(), set()
    for early in MODES:
        for penalty in (0, 1, 2):
            result = run(model, PROMPTS, config, width=width, length_penalty=penalty, early_stopping=early)
            options = dict(penalty=penalty, early=early)
            assert_equal(result, [expected_of(log_probs, prompt, width, **options) for prompt in PROMPTS])
            assert_released(result.cache)
            ended.update(result.finish)
            lengths.update(len(tokens) for pool in result.tokens for tokens in pool)
            assert result.peak_pages < result.peak_pages_unshared or page_size == 4
    assert ended == {Finish.STOP, Finish.LENGTH}
    assert len(lengths) > 2


def test_one_beam_writes_greedy_text(model, log_probs):
    result = run(model, PROMPTS, cache_config(), width=1)
    for prompt, ((tokens,), reason) in zip(
        PROMPTS, zip(result.tokens, result.finish, strict=True), strict=True
    ):
        text = list(prompt)
        while len(text) < len(prompt) + NEW_TOKENS and text[-1] not in STOPS:
            text.append(int(log_probs([tuple(text)])[0].argmax()))
        assert tokens == text[len(prompt) :]
        assert reason == (Finish.STOP if tokens[-1] in STOPS else Finish.LENGTH)


def test_limits_may_differ(model, log_probs):
    limits = [10, 1, 4]
    result = run(model, PROMPTS, cache_config(), max_new_tokens=limits, length_penalty=2.0)
    expected = [
        expected_of(log_probs, prompt, 4, penalty=2, limit=limit)
        for prompt, limit in zip(PROMPTS, limits, strict=True)
    ]
    assert_equal(result, expected)
    assert result.finish == [Finish.LENGTH] * 3
    assert result.search_steps == 9


def test_a_pool_with_just_enough_pages_gives_the_same_and_one_page_less_a_shorter_search(model, log_probs):
    """The other prompts end with their first token. Copies of shared pages need no page beside the pool's."""
    search = partial(run, model, prompts=PROMPTS, max_new_tokens=[10, 1, 1], length_penalty=2.0)
    whole = expected_of(log_probs, PROMPTS[0], 4, penalty=2)
    needs = [pages_of(texts, 4) for texts in whole.steps]
    result = search(cache=with_free_pages(cache_config(), max(needs)))
    assert (result.tokens[0], result.finish[0]) == (whole.tokens, Finish.LENGTH)
    assert_released(result.cache, max(needs))

    result = search(cache=with_free_pages(cache_config(), max(needs) - 1))
    cut = expected_of(log_probs, PROMPTS[0], 4, penalty=2, most_steps=needs.index(max(needs)))
    assert (result.tokens[0], result.finish[0]) == (cut.tokens, Finish.OUT_OF_PAGES)
    np.testing.assert_allclose(result.scores[0], cut.scores, atol=1e-5, rtol=0)
    assert len(cut.tokens[0]) < 10
    assert_released(result.cache, max(needs) - 1)
    assert int(jaxkv.lengths(result.cache)[12]) == (32 - max(needs) + 1) * 4


@pytest.mark.parametrize("pages", [6, 9, 12, 17, 22, 26])
def test_prompts_wait_for_pages_and_the_last_ends_when_all_wait(model, log_probs, pages):
    result = run(model, PROMPTS, cache=with_free_pages(cache_config(), pages), length_penalty=2.0)
    assert_released(result.cache, pages)
    whole = [expected_of(log_probs, prompt, 4, penalty=2) for prompt in PROMPTS]
    for number, (prompt, reason) in enumerate(zip(PROMPTS, result.finish, strict=True)):
        if reason == Finish.OUT_OF_PAGES:
            cuts = [
                expected_of(log_probs, prompt, 4, penalty=2, most_steps=steps).tokens for steps in range(9)
            ]
            assert result.tokens[number] in cuts
        else:
            assert result.tokens[number] == whole[number].tokens
    most = [max(pages_of(texts, 4) for texts in one.steps) for one in whole]
    assert (result.finish[0] == Finish.OUT_OF_PAGES) == (pages < most[0])
    assert pages < sum(most) or Finish.OUT_OF_PAGES not in result.finish


def test_other_sequences_stay_the_cache_is_consumed_and_all_orders_of_arguments_are_one(model):
    config = cache_config()
    expected = run(model, PROMPTS, config)
    given = with_free_pages(config, 30)
    # Slots 0, 1 and 2 hold nothing, and 3 is taken.
    given, _ = jitted.allocate(given, jnp.array([3]), jnp.array([3]), total_tokens=128)
    with pytest.raises(ValueError, match="3 prompts x 4 beams need 12 slots; 11 of"):
        run(model, given, PROMPTS)
    given = with_free_pages(config, 30)
    for result in (run(model, given, PROMPTS), run(model, config, PROMPTS)):
        assert (result.tokens, result.finish) == (expected.tokens, expected.finish)
        np.testing.assert_allclose(result.scores[0], expected.scores[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="consumed by an earlier call"):
        run(model, given, PROMPTS)


def test_prompts_of_one_shape_compile_once(model):
    run(model, PROMPTS, cache_config())
    programs = search_programs()
    reversed_prompts = [prompt[::-1] for prompt in PROMPTS]
    for penalty, early, stops in ((0.5, "never", (1, 2)), (-1, True, (3, 4))):
        options = dict(length_penalty=penalty, early_stopping=early, stop_tokens=stops)
        jaxkv.beam_search(model, reversed_prompts, cache_config(), max_new_tokens=10, **options)
    assert search_programs() == programs


def search_programs() -> int:
    return jaxkv.beams._start._cache_size() + jaxkv.beams._search._cache_size()


@pytest.mark.slow
def test_the_compiled_search_updates_the_pool_in_place(model):
    config = cache_config(num_pages=8192, max_pages_per_seq=32, max_seqs=4)
    slots = jnp.arange(4, dtype=jnp.int32).reshape(2, 2)
    begin = partial(start, slots=slots, max_new_tokens=8, stop_tokens=jnp.array(STOPS))
    logits, limits = jnp.zeros((2, 64)), jnp.array([8, 8])
    state = jax.eval_shape(begin, jitted.init(config), logits=logits, limits=limits)
    assert_in_place(search, model, state, 100, donate_argnums=1)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Table:
    """Its probabilities of three tokens go by the newest token: after 2 never comes 0."""

    rows = ((0.5, 0.25, 0.25), (0.5, 0.125, 0.375), (0.0, 0.5, 0.5))

    def __call__(self, tokens, cache, batch, *, rows=None):
        zeros = jnp.zeros((tokens.shape[0], 1, 8))
        cache = jaxkv.append(cache, 0, batch, zeros, zeros)
        return jnp.log(jnp.array(self.rows))[tokens if rows is None else tokens[rows]], cache


@pytest.mark.slow
def test_more_beams_than_tokens_find_every_sequence_up_to_a_full_row_and_ties_go_by_token():
    config = jaxkv.CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=8, num_pages=40, page_size=1, max_seqs=30, max_pages_per_seq=4
    )
    result = jaxkv.beam_search(Table(), [[1, 0]], config, width=30, max_new_tokens=5, length_penalty=0)

    def probability(text):
        return np.prod([Table.rows[a][b] for a, b in zip((0, *text), text, strict=False)])

    texts = sorted(
        (text for text in np.ndindex(3, 3, 3) if probability(text)), key=lambda text: -probability(text)
    )
    assert sorted(map(tuple, result.tokens[0])) == sorted(texts)
    np.testing.assert_allclose(np.exp(result.scores[0]), [probability(text) for text in texts], rtol=1e-5)
    assert result.tokens[0][:3] == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
    assert result.finish == [Finish.LENGTH]
    assert_released(result.cache)


def test_the_largest_of_many_values_are_found_by_blocks_and_ties_go_by_index():
    values = jnp.asarray(np.random.default_rng(0).integers(0, 60, (3, 3001)).astype(np.float32))
    values = values.at[1, 5:].set(-jnp.inf)
    best, index = jax.jit(largest, static_argnums=1)(values, 8)
    expected, first = jax.lax.top_k(values, 8)
    np.testing.assert_array_equal(best, expected)
    np.testing.assert_array_equal(index, jnp.where(expected > -jnp.inf, first, index))


def test_the_likeliest_token_is_the_first_of_equal_ones_and_a_nan_before_all():
    nan, inf = float("nan"), float("inf")
    rows = [[1, 3, 3, 2], [-inf] * 4, [0.0, -0.0, -1, 0.0], [5, nan, 9, nan], [inf, 1, inf, 0], [nan] * 4]
    values = jnp.array(rows, jnp.float32)
    assert jax.jit(likeliest)(values).tolist() == jnp.argmax(values, axis=1).tolist() == [1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(width=0), "width=0 must be a positive integer"),
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(max_new_tokens=[1, 2]), "one for each of the 3 prompts"),
        (dict(length_penalty=float("nan")), "length_penalty=nan must be a finite number"),
        (dict(early_stopping="always"), "early_stopping='always' must be False, True or \"never\""),
        (dict(early_stopping=1), "early_stopping=1 must be"),
        (dict(stop_tokens=[64]), "token id 64 is beyond the vocabulary"),
        (dict(width=5), "3 prompts x 5 beams need 15 slots"),
        (dict(cache=3), "cache=3 must be a jaxkv.KVCache"),
        (dict(prompts=[[1], [], [2]]), "prompt 1 is empty"),
    ],
)
def test_mistakes_are_named_before_anything_is_computed(model, options, message):
    config = None if "cache" in options else cache_config()
    with pytest.raises(ValueError, match=message):
        jaxkv.beam_search(model, **{"prompts": PROMPTS, "config": config, **options})


def test_a_policy_is_refused_and_prompts_that_do_not_fit_are(model):
    cache = jitted.init(cache_config(), SlidingWindow(window=8))
    with pytest.raises(ValueError, match="has the policy SlidingWindow"):
        run(model, cache, PROMPTS)
    with pytest.raises(jaxkv.OutOfPagesError, match="need 5 pages"):
        run(model, with_free_pages(cache_config(), 4), PROMPTS)
    with pytest.raises(jaxkv.SequenceTooLongError, match="prompt 0 has 129 tokens"):
        run(model, [[1] * 129], cache_config())


@pytest.mark.slow
def test_windows_found_prefixes_and_waiting_change_nothing():
    """Two layers of a window of 5 beside a full one, pages of 2 tokens."""
    config = replace(TINY, num_layers=3, window=5, full_attention_layers=(1,))
    model = random_model(config, jax.random.key(3))
    sizes = dict(num_pages=64, page_size=2, max_seqs=13, dtype="float32", prefix_cache=True)
    cache, log_probs = jitted.init(config.cache_config(**sizes)), log_probs_of(model)
    for limits in ([10, 1, 1], [1, 10, 1], [10, 10, 10]):
        result = run(model, PROMPTS, cache=cache, length_penalty=2, max_new_tokens=limits)
        assert result.found_tokens > 0 or limits == [10, 1, 1]
        expected = [
            by_hand(log_probs, prompt, 4, limit=limit, stops=STOPS, penalty=2)
            for prompt, limit in zip(PROMPTS, limits, strict=True)
        ]
        assert_equal(result, expected)
        # All three together wait for each other's pages.
        assert (result.search_steps > 9) == (limits == [10, 10, 10])
        cache = result.cache
        jaxkv.check_invariants(cache)
        assert not jaxkv.lengths(cache).any()
