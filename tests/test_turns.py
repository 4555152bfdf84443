"""Several turns on one cache: what stays in it, what is computed again, and what is refused."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
import jaxkv.testing
from jaxkv.decode import Finish
from jaxkv.models import random_model
from jaxkv.policies import HeavyHitter, SlidingWindow
from tests.tiny_model import TINY

MODEL = replace(TINY, num_layers=2)
CONFIG = MODEL.cache_config(num_pages=64, page_size=4, max_seqs=8, max_pages_per_seq=16, dtype="float32")
PROMPTS, REPLIES = [[1, 2, 3], list(range(4, 15))], [[30, 31], [40, 41, 42, 43, 44]]
NEW = 6


@pytest.fixture(scope="module")
def run():
    """Every call has the shapes of the others, so that one set of programs serves all."""
    model = random_model(MODEL, jax.random.key(3))
    return partial(jaxkv.generate, model, max_new_tokens=NEW, keep=True, prefill_chunk=8)


@pytest.fixture
def first(run):
    return run(PROMPTS, CONFIG)


@pytest.fixture(scope="module")
def whole(run):
    """The second turn, from the concatenated text in a new cache."""
    before = run(PROMPTS, CONFIG).tokens
    text = [prompt + new + reply for prompt, (new,), reply in zip(PROMPTS, before, REPLIES, strict=True)]
    return run(text, CONFIG)


def test_two_turns_give_what_one_prompt_of_all_their_tokens_gives(run, first, whole):
    assert first.finish == [[Finish.LENGTH]] * 2 and first.slots == [[0], [1]]
    second = run(REPLIES, cache=first)
    assert second.tokens == whole.tokens
    # The newest token of the first turn, and the reply.
    assert second.prefill_tokens == 3 + 6 and whole.prefill_tokens == 3 + 6 + 2 + 11 + 6 + 5
    jaxkv.testing.assert_invariants(second.cache)
    np.testing.assert_array_equal(second.cache.table.lengths, whole.cache.table.lengths)


def test_a_kept_sequence_lacks_only_its_newest_token(run, first, whole):
    lengths = [len(prompt) + NEW - 1 for prompt in PROMPTS]
    assert first.cache.table.lengths.tolist() == [*lengths, *[0] * 6]
    newest = [new[-1] for (new,) in first.tokens]
    assert first.pending == {0: newest[0], 1: newest[1]}
    replies = [[token, *reply] for token, reply in zip(newest, REPLIES, strict=True)]
    assert run(replies, cache=first.cache).tokens == whole.tokens


def test_slots_may_be_named_in_any_order_and_one_at_a_time(run, first, whole):
    third = run([[5], REPLIES[1]], cache=first, seqs=[7, np.int64(1)])
    assert (
        third.tokens[1] == whole.tokens[1] and third.slots == [[7], [1]] and set(third.pending) == {0, 1, 7}
    )
    # The slot that was left out goes on from where it was.
    last = run([[6], REPLIES[0]], cache=third, seqs=[4, 0])
    assert last.tokens[1] == whole.tokens[0] and set(last.pending) == {0, 1, 4, 7}
    jaxkv.testing.assert_invariants(last.cache)


def test_an_empty_prompt_goes_on_writing(run, first):
    second = run([[], [50] * 7], cache=first)
    text = [prompt + new for prompt, (new,) in zip(PROMPTS, first.tokens, strict=True)]
    assert second.tokens == run([text[0], text[1] + [50] * 7], CONFIG).tokens and second.prefill_tokens == 9


def test_samples_of_a_turn_go_to_empty_slots_and_share_its_text(run, first, whole):
    second = run(REPLIES, cache=first, num_samples=2)
    assert second.tokens == [tokens * 2 for tokens in whole.tokens]
    assert second.slots == [[0, 2], [1, 3]] and second.peak_pages < second.peak_pages_unshared
    # Two that still share pages go on with different texts.
    copy = replace(second, cache=jax.tree.map(jnp.copy, second.cache))
    alike = run([[9], [9]], cache=copy, seqs=[0, 2])
    third = run([[8], [9]], cache=second, seqs=[0, 2])
    assert third.tokens[1] == alike.tokens[0] == alike.tokens[1] != third.tokens[0]
    jaxkv.testing.assert_invariants(third.cache)


def test_a_turn_that_is_not_kept_leaves_the_cache(run, first, whole):
    second = run(REPLIES, cache=first, keep=False)
    assert second.tokens == whole.tokens and second.pending == {}
    assert int(second.cache.table.num_free) == 64
    # An emptied cache serves new prompts like a new one.
    assert run(PROMPTS, cache=second).tokens == first.tokens


def test_a_prompt_of_no_new_tokens_is_kept_for_the_next_turn(run, first, whole):
    middle = run(REPLIES, cache=first, max_new_tokens=[0, NEW])
    assert middle.tokens == [[[]], whole.tokens[1]] and set(middle.pending) == {1}
    assert middle.finish[0] == [Finish.LENGTH]
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        run([[], []], cache=middle)


def test_a_stop_by_on_tokens_keeps_the_sequence_too(run, first):
    other = run(PROMPTS, CONFIG, block=2, on_tokens=lambda state: np.asarray(state.num_generated) >= [3, 99])
    assert other.tokens == [[first.tokens[0][0][:3]], first.tokens[1]]
    assert other.finish == [[Finish.STOP], [Finish.LENGTH]]
    assert other.cache.table.lengths[0] == len(PROMPTS[0]) + 2


def test_kept_sequences_without_a_page_end_one_after_the_other(run):
    config = replace(CONFIG, num_pages=5, max_pages_per_seq=5)
    result = run(PROMPTS, config)
    assert {Finish.OUT_OF_PAGES} <= {reason for (reason,) in result.finish}
    lengths = [len(prompt) + len(new) - 1 for prompt, (new,) in zip(PROMPTS, result.tokens, strict=True)]
    assert result.cache.table.lengths[:2].tolist() == lengths
    jaxkv.testing.assert_invariants(result.cache)
    with pytest.raises(jaxkv.OutOfPagesError, match="0 of the pool's 5 are free"):
        run([[1] * 8, [1]], cache=result)


def test_a_given_cache_is_consumed_and_a_copy_is_not(run, first):
    copy = jax.tree.map(jnp.copy, first.cache)
    run(REPLIES, cache=first)
    with pytest.raises(ValueError, match="consumed by an earlier call"):
        run(REPLIES, cache=first)
    run(REPLIES, cache=copy)


def test_with_a_window_two_turns_give_what_one_gives(run):
    """The window's policy is part of what was returned; it moves over both turns."""
    config = replace(CONFIG, max_pages_per_seq=6)
    policy = SlidingWindow(8, 2)
    one = run(PROMPTS, config, policy=policy)
    two = run([[*range(30, 50)], [*range(40, 53)]], cache=one)
    text = [
        prompt + new + list(reply)
        for prompt, (new,), reply in zip(PROMPTS, one.tokens, (range(30, 50), range(40, 53)), strict=True)
    ]
    assert two.tokens == run(text, config, policy=policy).tokens
    assert int(two.cache.stats.evictions) > 2
    jaxkv.testing.assert_invariants(two.cache)
    with pytest.raises(ValueError, match="not that of the cache"):
        run(REPLIES, cache=two, policy=SlidingWindow(8, 3))


REFUSED = {
    "seqs without a cache": (dict(seqs=[0, 1]), "give cache= too"),
    "a slot named twice": (dict(seqs=[1, 1]), r"seqs\[1\]=1 is named twice"),
    "no such slot": (dict(seqs=[0, 8]), r"seqs\[1\]=8 is not one of the cache's 8"),
    "padding": (dict(seqs=[0, -1]), r"seqs\[1\]=-1 must be"),
    "a slot for one of two": (dict(seqs=[0]), "names 1 slots for 2 prompts"),
    "another config": (dict(config=replace(CONFIG, num_pages=32)), "not that of the given cache"),
    "no cache": (dict(cache=CONFIG), "must be a jaxkv.KVCache or what generate returned"),
    "more samples than slots": (dict(num_samples=5), "need 8 empty slots beside their own; the cache has 6"),
    "a row that is full": (
        dict(prompts=[[1] * 60, [1]]),
        "has 61 tokens after the 8 in its slot; a sequence holds 64",
    ),
    "a policy that saw nothing": (
        dict(policy=HeavyHitter(12, 4)),
        "must observe sequences from their first",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_turn_that_cannot_go_on_is_refused_and_the_cache_is_not_consumed(run, first, name):
    options, message = REFUSED[name]
    cache = {} if "without" in name else {"cache": first}
    with pytest.raises((ValueError, jaxkv.SequenceTooLongError), match=message):
        run(**{"prompts": REPLIES, **cache, **options})
    jaxkv.testing.assert_invariants(first.cache)
