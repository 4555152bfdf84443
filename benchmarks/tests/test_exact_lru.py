"""The yardsticks of `bench_prefixes`: what can be found, which pages are kept, and the order of requests."""

import json
import random

import pytest

from benchmarks.conversations import Request, arrivals, chats_of
from benchmarks.exact_lru import PAGE_SIZE, ExactLRU, pages_at_once, pages_needed, serve
from benchmarks.prefix_text import AT_ONCE, together


def text(*pages: int, more: int = 0) -> tuple[int, ...]:
    """Pages of equal tokens, and some tokens of another."""
    return tuple(page for page in pages for _ in range(PAGE_SIZE)) + (99,) * more


def random_requests(seed: int, count: int = 60) -> list[Request]:
    """Prompts that share beginnings, answers included, and part within pages too."""
    draw = random.Random(seed)
    known, requests = [()], []
    for number in range(count):
        before = draw.choice(known)
        start = before[: draw.randint(0, len(before))]
        prompt = start + tuple(draw.choices((1, 2), k=draw.randint(1, 3 * PAGE_SIZE)))
        answer = tuple(draw.choices((1, 2), k=draw.randint(0, 2 * PAGE_SIZE)))
        requests.append(Request(number, prompt, answer))
        known.append(prompt + answer)
    return requests


def whole_pages_in_common(a, b) -> int:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same // PAGE_SIZE * PAGE_SIZE


@pytest.mark.parametrize("seed", range(3))
def test_an_unlimited_pool_finds_the_longest_beginning_that_any_earlier_request_had(seed):
    requests, computed = random_requests(seed), 0
    for number, request in enumerate(requests):
        earlier = [other.prompt + other.answer for other in requests[:number]]
        found = max((whole_pages_in_common(request.prompt[:-1], other) for other in earlier), default=0)
        computed += len(request.prompt) - found
    assert serve(ExactLRU(), requests) == computed
    assert serve(ExactLRU(pages_needed(requests) + pages_at_once(requests, 1)), requests) == computed


@pytest.mark.parametrize("seed", range(3))
def test_a_limited_pool_keeps_what_a_table_of_last_uses_keeps(seed):
    requests = random_requests(seed)
    num_pages = pages_at_once(requests, 1) + 3
    last_use, computed = {}, 0  # all tokens up to the end of a page -> (number of the last request, -length)
    for now, request in enumerate(requests):
        whole, matched = request.prompt + request.answer, 0
        while matched + PAGE_SIZE < len(request.prompt) and whole[: matched + PAGE_SIZE] in last_use:
            matched += PAGE_SIZE
        computed += len(request.prompt) - matched
        ours = [whole[:end] for end in range(PAGE_SIZE, len(whole) + 1, PAGE_SIZE)]
        held = {page for page in ours if len(page) <= matched}
        new = -(-len(whole) // PAGE_SIZE) - len(held)
        while len(last_use) + new > num_pages:
            del last_use[min(last_use.keys() - held, key=last_use.__getitem__)]
        last_use |= {page: (now, -len(page)) for page in ours}
    assert computed > serve(ExactLRU(), requests)
    assert serve(ExactLRU(num_pages), requests) == computed


def test_the_end_of_a_text_is_reclaimed_before_its_beginning():
    cache = ExactLRU(4)
    for slot, tokens in enumerate((text(1, 2, 3), text(4, 5))):
        cache.match(slot, tokens)
        cache.prefill(slot, tokens)
        cache.record(slot, tokens)
        cache.free(slot)
    assert cache.match(0, text(1, 2, 3, more=1)) == 2 * PAGE_SIZE
    assert cache.match(1, text(4, 5, more=1)) == 2 * PAGE_SIZE


def test_pages_in_use_are_never_reclaimed():
    cache = ExactLRU(2)
    cache.match(0, text(1, 2))
    cache.prefill(0, text(1, 2))
    cache.record(0, text(1, 2))
    cache.match(1, text(3))
    with pytest.raises(MemoryError):
        cache.prefill(1, text(3))


def test_equal_texts_at_once_are_recorded_once_and_the_other_copy_is_free_afterwards():
    cache = ExactLRU(4)
    for slot in (0, 1):
        cache.match(slot, text(1, 2))
    for slot in (0, 1):
        cache.prefill(slot, text(1, 2))
        cache.record(slot, text(1, 2))
    for slot in (0, 1):
        cache.free(slot)
    assert (cache.in_use, len(cache.queue)) == (0, 2)


def test_requests_of_one_conversation_follow_each_other_and_others_do_not_wait_for_them():
    events = []

    class Listening(ExactLRU):
        def match(self, slot, prompt):
            events.append(("begins", slot, prompt[0]))
            return super().match(slot, prompt)

        def free(self, slot):
            events.append(("ends", slot))
            super().free(slot)

    answers = (0,) * (2 * PAGE_SIZE)
    requests = [Request(conversation, (first,), answers) for first, conversation in enumerate((7, 7, 8))]
    serve(Listening(), requests, in_flight=2)
    assert events == [
        ("begins", 0, 0),
        ("begins", 1, 2),
        ("ends", 0),
        ("ends", 1),
        ("begins", 0, 1),
        ("ends", 0),
    ]


def test_conversations_are_read_up_to_where_the_file_is_cut_off():
    def record(*by):
        return {"id": "x", "conversations": [{"from": who, "value": f"{i}"} for i, who in enumerate(by)]}

    records = [record(*["human", "gpt"] * 2, "human"), record("gpt", "human", "gpt", "human"), record()]
    records += [record("human", "gpt"), record("human", "human", "gpt", "gpt"), record(*["human", "gpt"] * 3)]
    whole = json.dumps(records, indent=1)
    first, last = chats_of(whole)
    assert [turn["role"] for turn in first] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in last] == ["0", "1", "2", "3", "4", "5"]
    assert list(chats_of(whole[:-20])) == [first]


def test_turns_arrive_in_order_within_each_conversation_and_conversations_are_interleaved():
    chats = [[dict(role="user", content="")] * 10 for _ in range(20)]
    order = arrivals(chats, seed=1)
    assert sorted(order) == [(number, turn) for number in range(20) for turn in range(5)]
    for number in range(20):
        assert [turn for of, turn in order if of == number] == list(range(5))
    assert order != sorted(order) and order == arrivals(chats, seed=1)


def test_turns_that_run_together_are_of_different_conversations_and_none_overtakes_its_own():
    turns = arrivals([[dict(role="user", content="")] * 10 for _ in range(6)])
    groups = list(together(turns))
    assert sorted(turn for group in groups for turn in group) == sorted(turns)
    assert all(len({number for number, _ in group}) == len(group) <= AT_ONCE for group in groups)
    for number in range(6):
        assert [turn for group in groups for of, turn in group if of == number] == list(range(5))
    first = list(dict.fromkeys(number for number, _ in turns))[:AT_ONCE]
    assert [number for number, _ in groups[0]] == first
