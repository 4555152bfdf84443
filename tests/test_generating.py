"""Generation with a small random model: ends, stops, samples, waiting, and what is refused."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.decode import Finish, decode, prefill, start
from jaxkv.fitting import check_fit
from jaxkv.models import dense_logits, random_model
from jaxkv.policies import HeavyHitter, PromptCompress, SlidingWindow
from jaxkv.sampling import GREEDY, Sampling
from jaxkv.sizing import fitting_config
from tests import jitted
from tests.tiny_model import TINY

DRAWN = Sampling(temperature=1.5, top_k=20)
# Most tests have as many sequences and new tokens as others: one compiled program serves them.
PROMPTS = [[1, 2, 3], list(range(4, 15)), [7], [9, 8, 7, 6, 5]]


@pytest.fixture(scope="module")
def model():
    return random_model(TINY, jax.random.key(2))


def cache_config(**changes) -> jaxkv.CacheConfig:
    sizes = dict(num_pages=64, page_size=4, max_seqs=8, max_pages_per_seq=16, dtype="float32")
    return TINY.cache_config(**{**sizes, **changes})


dense = jax.jit(dense_logits)


def logits_of(model, tokens: list[int]) -> np.ndarray:
    """Of every token, computed without a cache; padded, so that one program serves all lengths."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(dense(model, padded, np.array([len(tokens)])))[0, : len(tokens)]


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The same by recomputing everything, each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def expected(model):
    return [greedy(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("prefill_chunk", [256, 8, 1])
def test_ragged_prompts_give_what_dense_recomputation_gives(model, expected, prefill_chunk):
    result = jaxkv.generate(model, cache_config(), PROMPTS, max_new_tokens=12, prefill_chunk=prefill_chunk)
    assert [samples[0] for samples in result.tokens] == expected
    assert all(reason == [Finish.LENGTH] for reason in result.finish)


def test_a_finished_generation_has_given_every_page_back(model):
    result = jaxkv.generate(model, cache_config(), PROMPTS, max_new_tokens=12)
    jaxkv.check_invariants(result.cache)
    assert int(result.cache.table.num_free) == 64


def test_a_common_beginning_is_prefilled_once_and_changes_nothing(model):
    shared = list(range(20, 40))
    prompts = [shared + prompt for prompt in PROMPTS]
    apart = jaxkv.generate(model, cache_config(), prompts, max_new_tokens=12, share_prefix=False)
    together = jaxkv.generate(model, cache_config(), prompts, max_new_tokens=12)
    assert together.tokens == apart.tokens
    assert together.prefill_tokens == apart.prefill_tokens - 3 * len(shared)
    assert together.peak_pages == apart.peak_pages - 3 * len(shared) // 4
    assert together.peak_pages_unshared == apart.peak_pages_unshared == apart.peak_pages


def test_identical_prompts_share_all_but_what_logits_need(model):
    result = jaxkv.generate(model, cache_config(), [PROMPTS[1]] * 4, max_new_tokens=12)
    assert all(samples == result.tokens[0] for samples in result.tokens[1:])


def test_greedy_samples_of_one_prompt_are_equal_and_share_its_pages(model, expected):
    result = jaxkv.generate(model, cache_config(), PROMPTS[:2], num_samples=2, max_new_tokens=12)
    assert result.tokens == [[expected[0]] * 2, [expected[1]] * 2]
    assert result.peak_pages < result.peak_pages_unshared


def test_sampling_repeats_with_its_key_and_differs_with_another(model):
    run = partial(
        jaxkv.generate,
        model,
        cache_config(),
        PROMPTS[:1],
        num_samples=4,
        max_new_tokens=12,
        sampling=DRAWN,
    )
    first = run(key=jax.random.key(1))
    assert first.tokens == run(key=jax.random.key(1)).tokens != run(key=jax.random.key(2)).tokens
    assert len({tuple(sample) for sample in first.tokens[0]}) == 4


def test_a_stop_token_ends_one_sequence_and_only_it(model, expected):
    stop = expected[0][4]
    result = jaxkv.generate(model, cache_config(), PROMPTS, max_new_tokens=12, stop_tokens=[stop])
    for samples, (reason,), whole in zip(result.tokens, result.finish, expected, strict=True):
        stops = stop in whole
        assert reason == (Finish.STOP if stops else Finish.LENGTH)
        assert samples[0] == (whole[: whole.index(stop) + 1] if stops else whole)


def test_a_full_row_ends_a_sequence(model, expected):
    config = cache_config(max_pages_per_seq=4)
    result = jaxkv.generate(model, config, PROMPTS[1:2], max_new_tokens=12)
    # Places 11..15 take five tokens; the sixth is drawn from the last place and needs none itself.
    assert result.tokens[0][0] == expected[1][:6]
    assert result.finish == [[Finish.LENGTH]]


def test_a_sequence_without_a_page_waits_for_one_that_stops(model, expected):
    """Two sequences of up to 15 places in 7 pages of 4: the second waits, takes the pages of the first
    when that stops, and writes what it would have written alone."""
    prompts, stop = [PROMPTS[0], PROMPTS[3]], expected[0][8]
    assert stop not in expected[0][:8] and stop not in expected[3]
    config = cache_config(num_pages=6, max_pages_per_seq=6)
    options = dict(max_new_tokens=12, stop_tokens=[stop], on_tokens=lambda _: None)
    result = jaxkv.generate(model, config, prompts, **options)
    assert result.tokens == [[expected[0][:9]], [expected[3]]]
    assert result.finish == [[Finish.STOP], [Finish.LENGTH]]
    assert result.decode_steps > 11
    assert int(result.cache.stats.refused_allocations) > 0


def test_more_prompts_than_slots_take_turns(model, expected):
    """In a pool that holds few of them, too: what finds no page waits and is computed again."""
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(9)]
    config = cache_config(num_pages=8, max_pages_per_seq=6)
    result = jaxkv.generate(model, config, prompts, max_new_tokens=[12] * 8 + [0])
    assert result.tokens == [[expected[number % len(PROMPTS)]] for number in range(8)] + [[[]]]
    assert {reason for (reason,) in result.finish} == {Finish.LENGTH}
    assert int(result.cache.table.num_free) == 8
    jaxkv.check_invariants(result.cache)
    with pytest.raises(jaxkv.SequenceTooLongError, match="prompt 8 has 30 tokens; a sequence holds 24"):
        jaxkv.generate(model, config, [*prompts[:8], [1] * 30])
    with pytest.raises(ValueError, match="prompt 8: token id 99 is beyond the vocabulary"):
        jaxkv.generate(model, config, [*prompts[:8], [99]])


def test_in_a_pool_too_small_for_all_none_ends_early(model, expected):
    config = cache_config(num_pages=4, max_pages_per_seq=4)
    result = jaxkv.generate(model, config, [PROMPTS[0], PROMPTS[3]], max_new_tokens=12)
    assert result.finish == [[Finish.LENGTH]] * 2 and result.slots == [[-1]] * 2
    assert result.tokens == [[expected[0]], [expected[3]]]
    jaxkv.check_invariants(result.cache)
    again = jaxkv.generate(model, [PROMPTS[3]], cache=result, max_new_tokens=12)
    assert again.tokens == [[expected[3]]]


def test_samples_of_a_pool_too_small_for_all_draw_as_many_tokens(model):
    """Each waits for itself: together they would all end for want of a page."""
    config = cache_config(num_pages=6, max_pages_per_seq=6)
    options = dict(max_new_tokens=8, num_samples=3, sampling=jaxkv.Sampling(temperature=1.0))
    result = jaxkv.generate(model, config, [PROMPTS[0], PROMPTS[2]], **options)
    assert [[len(tokens) for tokens in samples] for samples in result.tokens] == [[8] * 3] * 2
    assert result.finish == [[Finish.LENGTH] * 3] * 2
    assert len({tuple(tokens) for samples in result.tokens for tokens in samples}) == 6


def test_samples_under_windows_that_an_empty_pool_cannot_hold_together_take_turns():
    """Windows release pages, so samples share none of them for long."""
    windowed = replace(TINY, window=6)
    model, prompts = random_model(windowed, jax.random.key(2)), [list(range(20)), [3]]
    sizes = dict(page_size=4, max_pages_per_seq=8, dtype="float32", num_pages=8, max_seqs=2)
    result = jaxkv.generate(model, windowed.cache_config(**sizes), prompts, num_samples=2, max_new_tokens=4)
    roomy = windowed.cache_config(**sizes | dict(num_pages=64, max_seqs=4))
    whole = jaxkv.generate(model, roomy, prompts, num_samples=2, max_new_tokens=4)
    assert result.tokens == whole.tokens and result.finish == whole.finish


def test_a_prompt_that_fills_the_pool_draws_one_token_in_its_turn(model):
    config = cache_config(num_pages=1, max_pages_per_seq=1)
    result = jaxkv.generate(model, config, [[1], [2, 3], [4, 5, 6, 7]], max_new_tokens=9)
    assert [len(tokens) for (tokens,) in result.tokens] == [4, 3, 1]
    assert result.tokens[2] == jaxkv.generate(model, config, [[4, 5, 6, 7]], max_new_tokens=9).tokens[0]
    assert result.finish == [[Finish.LENGTH]] * 3


def test_what_need_not_run_takes_no_turn(model):
    config = cache_config(num_pages=8, max_pages_per_seq=8)
    result = jaxkv.generate(model, config, [list(range(28)), [1, 2]], max_new_tokens=[0, 8])
    assert result.slots == [[0], [1]] and len(result.tokens[1][0]) == 8


def test_when_all_wait_the_last_ends_and_makes_room_for_those_that_are_watched(model, expected):
    config = cache_config(num_pages=4, max_pages_per_seq=4)
    result = jaxkv.generate(
        model, config, [PROMPTS[0], PROMPTS[3]], max_new_tokens=12, on_tokens=lambda _: None
    )
    assert result.finish == [[Finish.LENGTH], [Finish.OUT_OF_PAGES]]
    assert result.tokens[0] == [expected[0]]
    assert result.tokens[1][0] == expected[3][: len(result.tokens[1][0])]
    jaxkv.check_invariants(result.cache)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_blocks_of_tokens_are_shown_as_they_come(model, expected, block):
    seen = []
    result = jaxkv.generate(
        model,
        cache_config(),
        PROMPTS,
        max_new_tokens=12,
        block=block,
        on_tokens=lambda state: seen.append(np.asarray(state.num_generated).max()),
    )
    assert [samples[0] for samples in result.tokens] == expected
    assert seen == [1, *range(1 + block, 12, block), 12]


def test_on_tokens_ends_the_sequences_it_names_and_only_them(model, expected):
    def see(state):
        return np.asarray(state.num_generated) * np.array([1, 0, 0, 0]) >= 5

    result = jaxkv.generate(model, cache_config(), PROMPTS, max_new_tokens=12, block=4, on_tokens=see)
    assert result.tokens == [[expected[0][:5]], *([tokens] for tokens in expected[1:])]
    assert result.finish == [[Finish.STOP], *[[Finish.LENGTH]] * 3]
    jaxkv.check_invariants(result.cache)
    assert int(result.cache.table.num_free) == 64


@pytest.mark.parametrize("ends", [[True], [1, 0, 0, 0], [[True] * 4]])
def test_on_tokens_must_return_a_boolean_for_each_sequence(model, ends):
    with pytest.raises(ValueError, match="boolean for each of the 4 sequences"):
        jaxkv.generate(model, cache_config(), PROMPTS, max_new_tokens=12, on_tokens=lambda state: ends)


def test_kept_logits_are_those_of_dense_attention(model, expected):
    result = jaxkv.generate(model, cache_config(), PROMPTS, max_new_tokens=12, keep_logits=True)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, expected, strict=True)):
        want = logits_of(model, prompt + tokens)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(result.logits[row], want, atol=1e-4)


def test_each_prompt_has_its_own_limit_and_one_of_zero_is_not_run(model, expected):
    limits = [3, 0, 12, 1]
    result = jaxkv.generate(model, cache_config(), PROMPTS, max_new_tokens=np.array(limits), keep_logits=True)
    assert result.tokens == [[whole[:limit]] for whole, limit in zip(expected, limits, strict=True)]
    assert result.finish == [[Finish.LENGTH]] * 4 and result.logits.shape == (4, 12, 64)
    assert result.prefill_tokens == 3 + 1 + 5 and int(result.cache.table.num_free) == 64


def test_no_new_tokens_run_nothing(model):
    result = jaxkv.generate(model, cache_config(), PROMPTS, max_new_tokens=0, num_samples=2)
    assert result.tokens == [[[], []]] * 4 and result.finish == [[Finish.LENGTH] * 2] * 4
    assert (result.prefill_tokens, result.decode_steps, result.peak_pages) == (0, 0, 0)


def test_each_prompt_has_its_own_sampling_and_draws_as_if_all_had_it(model, expected):
    run = partial(jaxkv.generate, model, cache_config(), PROMPTS, max_new_tokens=12, key=jax.random.key(4))
    mixed = run(sampling=[GREEDY, DRAWN, Sampling(temperature=0.9, top_p=0.8), DRAWN])
    alike = run(sampling=DRAWN)
    assert mixed.tokens[0] == [expected[0]]
    assert [mixed.tokens[1], mixed.tokens[3]] == [alike.tokens[1], alike.tokens[3]]
    assert mixed.tokens[2] not in ([expected[2]], alike.tokens[2])


def test_numpy_numbers_are_counts_like_python_s_own(model, expected):
    counts = dict(
        num_samples=np.int64(1), prefill_chunk=np.uint8(8), block=np.int32(3), max_new_tokens=np.int32(12)
    )
    result = jaxkv.generate(model, cache_config(), PROMPTS, **counts)
    assert result.tokens == [[whole] for whole in expected]


def test_a_model_that_makes_its_cache_s_config_needs_none(model, expected):
    """It holds every sequence at its longest, in the dtype of the weights; samples need no other pages."""
    result = jaxkv.generate(model, PROMPTS, max_new_tokens=12, num_samples=2)
    assert result.tokens == [[whole] * 2 for whole in expected]
    config = result.cache.config
    assert (config.max_seqs, config.dtype, config.page_size) == (8, "float32", 16)
    assert config.max_pages_per_seq == 2 and config.num_pages == 2 * (1 + 2 + 1 + 2) + 4


def test_config_and_prompts_may_come_in_either_order(model, expected):
    for order in ((PROMPTS, cache_config()), (cache_config(), PROMPTS)):
        assert jaxkv.generate(model, *order, max_new_tokens=12).tokens == [[whole] for whole in expected]
    with pytest.raises(ValueError, match="config='large' must be"):
        jaxkv.generate(model, PROMPTS, "large")


def test_a_model_without_a_config_must_be_given_one(model):
    with pytest.raises(ValueError, match=r"Partial has no method cache_config.* give generate"):
        jaxkv.generate(jax.tree_util.Partial(model), PROMPTS)


@pytest.mark.parametrize("policy", [None, HeavyHitter(20, 4), SlidingWindow(24), PromptCompress(24, 8)])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_pool_sized_for_prompts_holds_them_whatever_they_share(model, policy, num_samples):
    prompts = {number: [*range(100), number] for number in range(3)}
    config = fitting_config(model, [101] * 3, [7, 70, 1], num_samples, policy, prefill_chunk=32)
    if policy is not None:
        policy.check(config)
    for shared in range(100 // config.page_size):
        check_fit(config, None, np.arange(9), prompts, shared, policy, 32)
    assert config.max_seqs == 3 * num_samples


def test_a_hundred_steps_trace_the_model_once(model):
    traces = []

    @jax.tree_util.register_static
    class Counting:
        def __call__(self, tokens, cache, batch, *, rows=None):
            traces.append(tokens.shape)
            return model(tokens, cache, batch, rows=rows)

    config = cache_config(max_pages_per_seq=32)
    jaxkv.generate(Counting(), config, PROMPTS, max_new_tokens=100, block=7, on_tokens=lambda state: None)
    assert traces == [(32,), (4,)]  # one chunk of prompts, one decode step


def test_the_parts_serve_a_caller_s_own_jit_and_compact_between_them(model, expected):
    """Other sequences come and go; the pages move; the text does not change."""
    cache = jaxkv.init(cache_config())
    cache, batch = jitted.allocate(cache, jnp.array([7]), jnp.array([30]), total_tokens=30)
    jaxkv.raise_for_status(batch)
    seqs = jnp.arange(4)
    flat = [token for prompt in PROMPTS for token in prompt]
    lengths = jnp.array([len(prompt) for prompt in PROMPTS])
    logits, cache, status = jax.jit(prefill, donate_argnames="cache")(
        model, cache, seqs, lengths, jnp.array(flat)
    )
    jaxkv.raise_for_status(status)
    begin = jax.jit(partial(start, max_new_tokens=12, sampling=GREEDY))
    state = begin(cache, seqs, logits, jax.random.key(0))
    run = jax.jit(partial(decode, sampling=GREEDY), donate_argnums=1)
    state = run(model, state, 5)
    cache, num_moved = jitted.compact(jitted.free(state.cache, jnp.array([7])))
    assert int(num_moved) > 0
    state = run(model, replace(state, cache=cache), 100)
    assert state.output.tolist() == expected


def test_compacting_by_itself_changes_no_text(model, expected):
    """The first prompt stops early, and leaves its pages below those of the others."""
    stop = expected[0][3]
    config = cache_config(compact_automatically=True, compaction_threshold=0.05)
    result = jaxkv.generate(model, config, PROMPTS, max_new_tokens=12, stop_tokens=[stop])
    until = [whole.index(stop) + 1 if stop in whole else None for whole in expected]
    assert result.tokens == [[whole[:end]] for whole, end in zip(expected, until, strict=True)]
    assert int(result.cache.stats.compactions) > 0
    assert int(result.cache.stats.pages_moved) > 0
    jaxkv.check_invariants(result.cache)


@pytest.mark.parametrize(
    ("changes", "prompts", "options", "error", "message"),
    [
        ({}, [], {}, ValueError, "no prompts"),
        ({}, [[1], []], {}, ValueError, "prompt 1 is empty"),
        ({}, [[1] * 65], {}, jaxkv.SequenceTooLongError, "prompt 0 has 65 tokens; a sequence holds 64"),
        ({}, [[1]] * 9, dict(keep=True), ValueError, "9 prompts x 1 samples need 9 slots"),
        ({}, [[1]] * 3, dict(num_samples=3, keep_logits=True), ValueError, "3 prompts x 3 samples"),
        ({}, [[1]] * 8 + [[]], {}, ValueError, "prompt 8 is empty"),
        (
            dict(num_pages=5, max_pages_per_seq=5),
            [[1] * 12, [2] * 12],
            dict(keep=True),
            jaxkv.OutOfPagesError,
            "6 pages",
        ),
        ({}, [[1]], dict(max_new_tokens=-1), ValueError, "max_new_tokens=-1 must be a non-negative integer"),
        ({}, [[1]], dict(max_new_tokens=True), ValueError, "max_new_tokens=True"),
        ({}, [[1]] * 2, dict(max_new_tokens=[3, -1]), ValueError, r"max_new_tokens\[1\]=-1"),
        ({}, [[1]] * 2, dict(max_new_tokens=[3]), ValueError, "one for each of the 2 prompts, not 1 values"),
        ({}, [[1]] * 2, dict(sampling=[GREEDY]), ValueError, "sampling must be one value or one for each"),
        ({}, [[1]] * 2, dict(sampling=[GREEDY, 0.7]), ValueError, "sampling=0.7 must be a jaxkv.Sampling"),
        ({}, [[1]], dict(block=np.bool_(True)), ValueError, "block="),
        ({}, [[1]], dict(prefill_chunk=0), ValueError, "prefill_chunk=0 must be a positive integer"),
        ({}, [[1]], dict(num_samples=0), ValueError, "num_samples=0"),
        ({}, [[1]], dict(max_new_tokens=1.5), ValueError, "max_new_tokens=1.5"),
        ({}, [[1]], dict(sampling=0.7), ValueError, "sampling=0.7"),
        ({}, [[1]], dict(stop_tokens=[2**40]), ValueError, "stop_tokens: token id"),
        ({}, [1, 2], {}, ValueError, "prompts must be a sequence of sequences"),
        ({}, 1, {}, ValueError, "prompts must be a sequence of sequences"),
        ({}, [np.int32(1)], {}, ValueError, "prompts must be a sequence of sequences"),
        ({}, [[1]], dict(stop_tokens=5), ValueError, "stop_tokens=5 must be a sequence of token ids"),
        ({}, [[1]], dict(key=0), ValueError, r"key must be a key such as jax.random.key\(0\), not 0"),
        ({}, [[1]], dict(sampling={"temperature": 1}), ValueError, "must be a jaxkv.Sampling"),
        ({}, [[1]], dict(policy="lru"), ValueError, "policy='lru' must be a jaxkv.Policy, such as"),
        ({}, [[1], [1.7]], {}, ValueError, "prompt 1: 1.7 is not a token id"),
        ({}, [[1], [True]], {}, ValueError, "prompt 1: True is not a token id"),
        ({}, [[-5]], {}, ValueError, "prompt 0: token id -5 is out of range"),
    ],
)
def test_what_cannot_fit_is_refused_with_its_numbers_before_anything_runs(
    changes, prompts, options, error, message
):
    def untouched(*_, **__):
        raise AssertionError("the model was called")

    with pytest.raises(error, match=message):
        jaxkv.generate(untouched, cache_config(**changes), prompts, **options)
