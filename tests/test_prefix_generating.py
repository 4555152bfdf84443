"""`generate` with `prefix_cache`: what is found, what is computed, and that no token changes."""

from dataclasses import replace
from functools import partial

import jax
import pytest

import jaxkv
from jaxkv.beginnings import beginnings
from jaxkv.models import random_model
from jaxkv.policies import SlidingWindow
from tests.test_turns import CONFIG, MODEL

FOUND = replace(CONFIG, prefix_cache=True)
SYSTEM, ONE, TWO = list(range(1, 10)), [20] * 6, [30] * 5
# Two begin alike, two others likewise, all four not at all; the fourth is the third and more.
PROMPTS = [SYSTEM + ONE, SYSTEM + TWO, ONE + TWO, ONE + TWO + SYSTEM]
NEW = 6


@pytest.fixture(scope="module")
def run():
    """Every call has the shapes of the others, so that one set of programs serves all."""
    model = random_model(MODEL, jax.random.key(3))
    return partial(jaxkv.generate, model, max_new_tokens=NEW, prefill_chunk=8)


@pytest.fixture(scope="module")
def alone(run):
    """Every prompt in a cache of its own: nothing is shared."""
    return run(PROMPTS, CONFIG, share_prefix=False)


def test_prompts_share_what_they_begin_with_in_pairs(run, alone):
    together = run(PROMPTS, FOUND)
    assert together.tokens == alone.tokens
    # Two pages of the system prompt, and two of the third prompt's eleven tokens.
    assert together.found_tokens == 8 + 8
    assert together.prefill_tokens == alone.prefill_tokens - 16
    assert together.peak_pages < alone.peak_pages
    jaxkv.check_invariants(together.cache)


def test_an_ended_text_is_found_again_with_what_was_generated(run, alone):
    first = run(PROMPTS, FOUND)
    table = first.cache.table
    assert int(table.num_free) + int(table.num_reclaimable) == 64 and int(table.num_reclaimable) > 0
    texts = [prompt + new[0] + [40, 41, 42] for prompt, new in zip(PROMPTS, first.tokens, strict=True)]
    again = run(texts, cache=first.cache)
    assert again.tokens == run(texts, CONFIG, share_prefix=False).tokens
    # All of each but the newest token, in whole pages.
    assert again.found_tokens == sum((len(prompt) + NEW - 1) // 4 * 4 for prompt in PROMPTS)
    jaxkv.check_invariants(again.cache)


@pytest.mark.slow
def test_kept_turns_are_found_from_other_slots(run):
    first = run(PROMPTS[:2], FOUND, keep=True)
    second = run([[50, 51], [52]], cache=first, keep=True)
    assert second.found_tokens == 0
    lengths = [len(second.held[slot]) for slot in (0, 1)]
    assert lengths == second.cache.table.lengths[:2].tolist()
    text = second.held[0] + second.tokens[0][0][-1:] + [60]
    other = run([text], cache=second.cache, seqs=[5], keep=True)
    assert other.found_tokens == lengths[0] // 4 * 4
    assert other.tokens == run([text], CONFIG).tokens
    jaxkv.check_invariants(other.cache)


@pytest.mark.slow
def test_without_the_generation_a_continued_slot_is_not_recorded(run):
    first = run(PROMPTS[:1], FOUND, keep=True)
    text = first.held[0]
    more = run([[first.pending[0], 50]], cache=first.cache, keep=True)
    assert more.held == {}
    other = run([[*text, first.pending[0], 50, 51, 52, 53]], cache=more.cache, seqs=[3])
    assert other.found_tokens == len(text) // 4 * 4  # recorded by the first call


@pytest.mark.slow
def test_samples_share_and_are_recorded_each(run):
    drawn = jaxkv.Sampling(temperature=1.5)
    options = dict(num_samples=2, sampling=drawn, key=jax.random.key(1))
    first = run(PROMPTS, FOUND, **options)
    assert first.tokens == run(PROMPTS, CONFIG, share_prefix=False, **options).tokens
    for prompt, samples in zip(PROMPTS, first.tokens, strict=True):
        assert samples[0] != samples[1]
        for new in samples:
            text = prompt + new + [1, 2]
            one = run([text], cache=jax.tree.map(lambda x: x.copy(), first.cache))
            assert one.found_tokens == (len(prompt) + NEW - 1) // 4 * 4


def test_share_prefix_false_looks_nothing_up(run, alone):
    apart = run(PROMPTS, FOUND, share_prefix=False)
    assert apart.tokens == alone.tokens and apart.found_tokens == 0
    assert int(apart.cache.stats.prefix_queries) == 0


@pytest.mark.slow
def test_windowed_layers_find_what_the_next_token_sees(run):
    windowed = replace(MODEL, num_layers=3, window=6, full_attention_layers=(1,))
    model = random_model(windowed, jax.random.key(4))
    config = windowed.cache_config(
        num_pages=120, page_size=4, max_seqs=8, max_pages_per_seq=16, dtype="float32", max_chunk=8
    )
    call = partial(jaxkv.generate, model, max_new_tokens=NEW, prefill_chunk=8)
    alone = call(PROMPTS, config, share_prefix=False)
    together = call(PROMPTS, replace(config, prefix_cache=True))
    assert together.tokens == alone.tokens and together.found_tokens == 16
    texts = [prompt + new[0] + [40, 41] for prompt, new in zip(PROMPTS, alone.tokens, strict=True)]
    again = call(texts, cache=together.cache)
    assert again.tokens == call(texts, config, share_prefix=False).tokens and again.found_tokens > 0
    jaxkv.check_invariants(again.cache)


@pytest.mark.slow
def test_a_policy_computes_prompts_whole(run):
    policy = SlidingWindow(8, sinks=2)
    found, plain = (run(PROMPTS, config, policy=policy) for config in (FOUND, CONFIG))
    assert found.tokens == plain.tokens and found.found_tokens == 0
    jaxkv.check_invariants(found.cache)


@pytest.mark.slow
def test_pages_of_old_texts_make_room_for_new_ones(run):
    small = replace(FOUND, num_pages=14, max_pages_per_seq=14)
    cache, texts = None, [[number] * 30 for number in range(1, 6)]
    for text in texts:
        result = run([text], cache=cache) if cache is not None else run([text], small)
        cache = result.cache
        assert result.tokens == run([text], CONFIG).tokens
        jaxkv.check_invariants(cache)
    assert int(cache.stats.prefix_pages_reclaimed) > 0


@pytest.mark.slow
def test_a_pool_that_fits_only_with_sharing_is_accepted(run):
    prompts = [SYSTEM * 4 + ONE[:number] for number in range(1, 5)]
    small = replace(FOUND, num_pages=24, max_pages_per_seq=14)
    result = run(prompts, small)
    assert result.tokens == run(prompts, CONFIG).tokens
    with pytest.raises(jaxkv.OutOfPagesError):
        run(prompts, small, share_prefix=False, keep=True)
    assert run(prompts, small, share_prefix=False).tokens == result.tokens


def test_a_prompt_longer_than_a_row_is_refused_however_much_is_shared(run):
    with pytest.raises(jaxkv.SequenceTooLongError, match="prompt 1 has 70 tokens"):
        run([[1] * 50, [1] * 70], FOUND)


@pytest.mark.slow
def test_without_a_config_prompts_in_pairs_find_each_other(run, alone):
    model = random_model(replace(MODEL, max_context=512), jax.random.key(3))
    prompts = [SYSTEM * 4 + ONE, SYSTEM * 4 + TWO, TWO * 8]
    result = jaxkv.generate(model, prompts, max_new_tokens=NEW)
    assert result.cache.config.prefix_cache and result.found_tokens == 32
    assert result.tokens == jaxkv.generate(model, prompts, max_new_tokens=NEW, share_prefix=False).tokens
    # What all begin with needs no index.
    assert not jaxkv.generate(model, prompts[:2], max_new_tokens=NEW).cache.config.prefix_cache


def test_waves_compute_no_beginning_twice():
    found = beginnings({0: [1] * 9, 1: [1] * 5, 2: [2] * 8, 3: [1] * 8 + [3] * 4, 4: [2] * 8}, block=4)
    assert {number: tuple(one) for number, one in found.items()} == {
        0: (0, 0),
        1: (4, 1),
        2: (0, 0),
        3: (8, 1),
        4: (4, 1),  # one token is left to compute
    }


@pytest.mark.slow
def test_what_the_index_holds_counts_as_room(run):
    """A kept text nearly fills the pool; recorded pages are neither copied nor in the way."""
    small = replace(FOUND, num_pages=12, max_pages_per_seq=12)
    first = run([[1] * 30], small, keep=True)
    second = run([[2]], cache=first, keep=True)
    text = first.held[0] + first.tokens[0][0][-1:] + [2]
    assert second.tokens == run([text], CONFIG).tokens
    ended = jaxkv.free(second.cache, second.cache.table.positions[:1] * 0)
    assert int(ended.table.num_reclaimable) > 0
    assert run([[3] * 40], cache=ended).tokens == run([[3] * 40], CONFIG).tokens
