"""Serving at its edges: what is refused, who waits, what changes logits, and the loop of the host."""

import asyncio
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Finish, Sampling, Status, serving
from jaxkv.serving import Phase, PromptLookup, Request, Requests, ServingConfig, programs, serve
from jaxkv.testing import assert_in_place
from tests.caches import ints
from tests.history_model import VOCAB, HistoryModel, alone, logits
from tests.test_serving_machine import ENTRIES, SERVERS, Twin, stream

CONFIG = SERVERS["prefixes"]
MODEL = HistoryModel(CONFIG.cache)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def test_random_streams_of_requests():
    for seed in range(12):
        stream(CONFIG, seed)


# Faults -------------------------------------------------------------------------------------


def test_a_request_that_finds_the_table_full_and_all_behind_it_are_refused():
    twin = Twin(CONFIG)
    requests = [Request(tokens=[1], num_samples=count, max_new_tokens=2) for count in (3, 4, 2, 1)]
    assert twin.submit(requests) == [Status.OK, Status.OK, Status.TABLE_FULL, Status.TABLE_FULL]
    with pytest.raises(jaxkv.RequestTableFullError, match="entry 1: the request table"):
        jaxkv.raise_for_status(np.array([0, Status.TABLE_FULL]))
    twin.finish()


def test_requests_that_can_never_fit_are_refused_at_once():
    twin = Twin(CONFIG)
    too_long = Request(tokens=prompt(CONFIG.max_tokens), max_new_tokens=1)
    too_many = Request(tokens=[1], num_samples=5)
    longest = Request(tokens=prompt(CONFIG.max_tokens - 1), max_new_tokens=9)
    statuses = twin.submit([too_long, too_many, longest])
    assert statuses == [Status.SEQUENCE_TOO_LONG, Status.INVALID_LENGTH, Status.OK]
    twin.finish()
    # 7 whole pages, and one more of each of 4 samples.
    config = replace(CONFIG, cache=replace(CONFIG.cache, num_pages=10))
    twin = Twin(config)
    wide = [Request(tokens=prompt(28), num_samples=count, max_new_tokens=1) for count in (4, 3)]
    assert twin.submit(wide) == [Status.OUT_OF_PAGES, Status.OK]


def test_padding_entries_and_empty_prompts():
    arrays = Requests.of([Request(tokens=[1, 2])], CONFIG, entries=ENTRIES)
    lengths, news = arrays.lengths.at[1].set(1), arrays.max_new_tokens.at[2].set(4)
    arrays = replace(arrays, lengths=lengths.at[0].set(0), max_new_tokens=news, num_samples=ints(1, 1, -1, 0))
    _, status = programs.submit(serving.init(CONFIG), arrays)
    invalid = Status.INVALID_LENGTH
    assert status.tolist() == [invalid, invalid, invalid, Status.PADDING]


def test_a_prompt_longer_than_its_row_of_tokens_is_refused():
    arrays = Requests.of([Request(tokens=[1, 2, 3]), Request(tokens=[1, 2])], CONFIG)
    _, status = serving.submit(serving.init(CONFIG), replace(arrays, tokens=arrays.tokens[:, :2]))
    assert status.tolist() == [Status.SEQUENCE_TOO_LONG, Status.OK]


def test_requests_all_stopped_at_their_first_token():
    twin = Twin(CONFIG)
    stops = [int(np.argmax(logits(prompt(5, seed), CONFIG.cache))) for seed in range(ENTRIES)]
    requests = [
        Request(tokens=prompt(5, seed), stop_tokens=[stop], id=seed) for seed, stop in enumerate(stops)
    ]
    twin.submit(requests)
    while twin.oracle.live(Phase.WAITING, Phase.RUNNING):
        twin.step()
    assert twin.take() == [(seed, 0, [stop], Finish.STOP) for seed, stop in enumerate(stops)]
    twin.finish()


def test_a_stop_token_in_the_prompt_ends_nothing():
    twin = Twin(CONFIG)
    text, _ = alone(Request(tokens=[3, 4, 5], max_new_tokens=4), 0, CONFIG.cache, CONFIG.max_tokens)
    stop = next(token for token in range(VOCAB) if token not in text[3:])
    twin.submit([Request(tokens=[stop, 3, 4, 5], max_new_tokens=1, stop_tokens=[stop])])
    twin.step()
    assert twin.take()[0][3] in (Finish.LENGTH, Finish.STOP)
    twin.finish()


def test_two_requests_that_each_fit_alone_both_finish():
    """Together they need twice the pool: one waits for the other, and neither is run in turns for ever."""
    twin = Twin(CONFIG)
    twin.submit([Request(tokens=prompt(13, seed), max_new_tokens=16, id=seed) for seed in (1, 2, 3)])
    twin.finish(most=3 * CONFIG.max_tokens)
    assert twin.oracle.preemptions


@pytest.mark.slow
def test_a_request_that_is_alone_and_still_out_of_pages_ends():
    config = SERVERS["one sequence"]
    twin = Twin(replace(config, cache=replace(config.cache, num_pages=2, max_pages_per_seq=2)))
    # 8 token slots in a row, so 9 tokens: the newest is in no page.
    twin.submit([Request(tokens=prompt(6), max_new_tokens=8)])
    while twin.oracle.live(Phase.WAITING, Phase.RUNNING):
        twin.step()
    assert [(len(new), finish) for _, _, new, finish in twin.take()] == [(3, Finish.LENGTH)]


def test_samples_that_outgrow_the_pool_alone_end():
    twin = Twin(CONFIG)
    # 2 shared pages and, of each of 4 samples, up to 5 more of the 12 in the pool.
    twin.submit(
        [Request(tokens=prompt(9), num_samples=4, max_new_tokens=20, sampling=Sampling(temperature=3.0))]
    )
    while twin.oracle.live(Phase.WAITING, Phase.RUNNING):
        twin.step()
    assert {finish for *_, finish in twin.take()} == {Finish.OUT_OF_PAGES}
    twin.finish()


def test_cancelling_the_sample_whose_prompt_others_wait_for():
    """The others go on where it was, and do not get the prompt of whoever has its slot next."""
    twin = Twin(CONFIG)
    twin.submit(
        [
            Request(tokens=prompt(26, 1), id=1, num_samples=3, max_new_tokens=3),
            Request(tokens=prompt(26, 2), id=2, max_new_tokens=3),
        ]
    )
    twin.step()
    twin.cancel_samples((1, 0), (1, 1))
    twin.step()
    assert [row.sample for row in twin.oracle.live(Phase.RUNNING)] == [2]
    twin.cancel_samples((1, 2))
    twin.finish()


def test_nothing_compiles_twice():
    stream(CONFIG, 900).cancel(1)
    every = programs.submit, programs.run, programs.take, programs.cancel
    sizes = [program._cache_size() for program in every]
    for seed in (901, 902):
        stream(CONFIG, seed)
    assert sizes == [program._cache_size() for program in every]


def test_the_first_of_equal_rank_starts_within_the_documented_steps():
    twin, started = Twin(CONFIG), {}
    for first in range(0, 8, ENTRIES):
        twin.submit(
            [
                Request(tokens=prompt(9, seed), max_new_tokens=12, id=seed)
                for seed in range(first, first + ENTRIES)
            ]
        )
    while twin.oracle.live(Phase.WAITING, Phase.RUNNING):
        twin.step()
        for row in twin.oracle.live(Phase.RUNNING):
            started.setdefault(row.request.id, twin.oracle.steps)
    for ahead, (number, step) in enumerate(sorted(started.items())):
        assert step <= (ahead + CONFIG.cache.max_seqs) * CONFIG.max_tokens, number
    assert list(started) == sorted(started)
    twin.finish()


# The pool -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loop_updates_the_pool_in_place():
    cache = replace(CONFIG.cache, num_pages=2**16, head_dim=64)
    config = replace(CONFIG, cache=cache)
    state = jax.eval_shape(partial(serving.init, config))
    run = partial(serving.run, HistoryModel(cache))
    assert_in_place(run, state, jax.ShapeDtypeStruct((), jnp.int32), max_temp_bytes=4 * 2**20)


# What changes logits ------------------------------------------------------------------------

PLAIN = ServingConfig(
    replace(CONFIG.cache, prefix_cache=False, num_pages=16),
    max_requests=4,
    max_tokens=24,
    token_budget=12,
    widths=(12,),
    log_probs=True,
    speculate=PromptLookup(ngram=1, num_tokens=2),
)


def odd_tokens_only(logits, tokens, lengths, ids):
    """No even token, and never one that is among the last two."""
    vocab = jnp.arange(logits.shape[1])[None]
    row = jnp.arange(tokens.shape[0])
    logits = jnp.where(vocab % 2 == 0, -jnp.inf, logits)
    for back in (1, 2):
        last = tokens[row, jnp.maximum(lengths - back, 0)]
        logits = jnp.where((vocab == last[:, None]) & (lengths > 0)[:, None], -jnp.inf, logits)
    return jnp.where((ids == 7)[:, None] & (vocab == 1), jnp.inf, logits)


def test_logits_fn_and_log_probabilities():
    requests = [Request(tokens=prompt(6, seed), id=seed, max_new_tokens=9) for seed in (1, 2)]
    got = {1: [], 2: []}
    for event in serve(HistoryModel(PLAIN.cache), PLAIN, requests, logits_fn=odd_tokens_only, block=3):
        got[event.id] += list(zip(event.tokens, event.log_probs, strict=True))
    for request in requests:
        text = list(request.tokens)
        for token, log_prob in got[request.id]:
            row = odd_tokens_only(
                jnp.asarray(logits(text, PLAIN.cache))[None],
                jnp.asarray([text]),
                ints(len(text)),
                ints(request.id),
            )
            expected = jax.nn.log_softmax(row[0])
            assert token == int(jnp.argmax(expected))
            np.testing.assert_allclose(log_prob, expected[token], rtol=1e-5)
            text.append(token)
        assert len(text) == 15


# The host -----------------------------------------------------------------------------------


def served(requests, config=CONFIG, **options):
    texts, ends = {}, {}
    for event in serve(HistoryModel(config.cache), config, requests, **options):
        key = event.id, event.sample
        texts[key] = texts.get(key, []) + list(event.tokens)
        if event.error or event.finish != Finish.RUNNING:
            assert key not in ends
            ends[key] = event.error or event.finish
    return texts, ends


def test_serve_gives_each_request_what_it_has_alone():
    rng = np.random.default_rng(3)
    requests = [
        Request(
            tokens=prompt(int(rng.integers(1, 16)), seed),
            max_new_tokens=int(rng.integers(1, 12)),
            num_samples=int(rng.integers(1, 3)),
            sampling=Sampling(temperature=1.0),
            seed=seed,
        )
        for seed in range(30)
    ]
    texts, ends = served(iter(requests))
    assert len(ends) == sum(request.num_samples for request in requests)
    for number, request in enumerate(requests):
        for sample in range(request.num_samples):
            text, _ = alone(request, sample, CONFIG.cache, CONFIG.max_tokens)
            assert texts[number, sample] == text[len(request.tokens) :]


def test_serve_takes_requests_as_they_come():
    def coming():
        yield Request(tokens=[1, 2], max_new_tokens=5)
        for _ in range(3):
            yield None
        yield Request(tokens=[4], max_new_tokens=2)

    texts, ends = served(coming(), block=1)
    assert set(ends) == {(0, 0), (1, 0)} and len(texts[1, 0]) == 2


def test_serve_ends_after_the_block_whose_on_state_says_so():
    blocks = []
    requests = [Request(tokens=[1], max_new_tokens=20), Request(tokens=[2], max_new_tokens=5)]
    events = list(
        serve(MODEL, CONFIG, requests, block=8, on_state=lambda state: blocks.append(1) or len(blocks) == 1)
    )
    assert len(blocks) == 1
    assert {event.id: (len(event.tokens), event.finish) for event in events} == {
        0: (8, Finish.RUNNING),
        1: (5, Finish.LENGTH),
    }
    assert all(0 < event.seconds < 600 for event in events)


def test_serve_says_why_it_refuses():
    requests = [
        Request(tokens=[VOCAB], id=1),
        Request(tokens=[1], stop=["x"], id=2),
        Request(tokens=[1], stop_tokens=range(9), id=3),
        Request(tokens=prompt(40), id=4),
        Request(tokens=[1], id=5, max_new_tokens=2),
        Request(tokens=[1], id=5, max_new_tokens=2),
    ]
    events, ends = served(requests[:5])
    assert [str(ends[number, 0]) for number in range(1, 5)] == [
        f"tokens: token id {VOCAB} is beyond the vocabulary of {VOCAB} tokens",
        "stop strings need a tokenizer",
        "9 stop tokens are more than max_stop_tokens=8",
        "the prompt has 40 tokens; with one more it exceeds max_tokens=30, or the 32 tokens of a row of "
        "the page table",
    ]
    assert ends[5, 0] == Finish.LENGTH
    events = list(serve(MODEL, CONFIG, requests[4:]))
    assert [event.error for event in events if event.error] == [
        "id 5 is that of a request that has not ended"
    ]


def test_requests_refused_by_the_host_have_numbers_of_their_own():
    requests = [
        Request(tokens=[VOCAB]),
        Request(tokens=[1], max_new_tokens=2),
        Request(tokens=[1], num_samples=2**30 - 1),
        Request(tokens=[1], max_new_tokens=2),
    ]
    _, ends = served(requests)
    assert ends[2, 0] == "num_samples=1073741823 is more than run at once, 4"
    assert {number: isinstance(end, str) for (number, _), end in ends.items()} == {
        0: True,
        1: False,
        2: True,
        3: False,
    }


def test_numbers_after_the_largest_id():
    ids = (0, 2**31 - 1, None, None)
    _, ends = served([Request(tokens=[1], id=number, max_new_tokens=2) for number in ids])
    assert set(ends) == {(number, 0) for number in (0, 1, 2, 2**31 - 1)}


def test_refusals_without_end_come_out_as_they_happen():
    def endless():
        while True:
            yield Request(tokens=[VOCAB])

    events = serve(MODEL, CONFIG, endless())
    assert [next(events).id for _ in range(20)] == list(range(20))


def test_as_many_new_tokens_as_there_are_integers():
    arrays = Requests.of([Request(tokens=[1, 2])], CONFIG)
    arrays = replace(arrays, max_new_tokens=ints(2**31 - 1))
    state, _ = serving.submit(serving.init(CONFIG), arrays)
    assert int(state.requests.limits[0]) == CONFIG.max_tokens


@pytest.mark.parametrize("width", [0, -1, 2.5])
def test_take_takes_a_token_at_least(width):
    with pytest.raises(ValueError, match=f"width={width}"):
        serving.take(serving.init(CONFIG), width=width)


def test_serve_takes_async_iterables():
    async def coming():
        for seed in range(3):
            await asyncio.sleep(0.01)
            yield Request(tokens=prompt(4, seed), max_new_tokens=3)

    async def collect():
        return [event async for event in serve(MODEL, CONFIG, coming())]

    events = asyncio.run(collect())
    assert sorted(event.id for event in events if event.finish == Finish.LENGTH) == [0, 1, 2]


def test_serve_closed_early_leaves_an_async_iterable_that_can_be_closed():
    closed = []

    async def coming():
        try:
            yield Request(tokens=[1], max_new_tokens=20)
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def some():
        source = coming()
        events = serve(MODEL, CONFIG, source, block=1)
        await anext(events)
        await events.aclose()
        await source.aclose()

    asyncio.run(some())
    assert closed == [True]


class Letters:
    """A tokenizer of letters; token 0 is "a"."""

    def stream(self, stop=()):
        from jaxkv.models.text_stream import _StopSearch

        return LetterStream(_StopSearch(tuple(stop)))


class LetterStream:
    def __init__(self, search):
        self.search = search

    def push(self, ids):
        return self.search.push("".join(chr(ord("a") + token) for token in ids))

    def finish(self):
        return self.search.rest()

    @property
    def stopped(self):
        return self.search.found


def test_stop_strings_end_a_sample_and_leave_the_others():
    request = Request(
        tokens=[1, 2, 3], num_samples=3, max_new_tokens=14, sampling=Sampling(temperature=2.0), id=4
    )
    texts = [alone(request, sample, CONFIG.cache, CONFIG.max_tokens)[0][3:] for sample in range(3)]
    words = ["".join(chr(ord("a") + token) for token in text) for text in texts]
    stop = words[1][4:6]
    got, ends = dict.fromkeys(range(3), ""), {}
    for event in serve(MODEL, CONFIG, [replace(request, stop=[stop])], tokenizer=Letters(), block=2):
        got[event.sample] += event.text
        ends[event.sample] = event.finish
    expected = [word.split(stop)[0] for word in words]
    assert [got[sample] for sample in range(3)] == expected
    assert ends[1] == Finish.STOP


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(token_budget=3), "token_budget=3 must be at least 4"),
        (dict(widths=(4, 9)), "widths=.* the largest token_budget=12"),
        (dict(max_tokens=1), "max_tokens=1 must be at least 2"),
        (dict(widths=12), "widths=12 must be positive numbers of tokens"),
        (dict(speculate="ngram"), "speculate='ngram' must be a jaxkv.serving.Drafter"),
        (dict(policy="lru"), "policy='lru' must be a jaxkv.Policy"),
        (dict(cache=None), "cache=None must be a jaxkv.CacheConfig"),
        (
            dict(policy=jaxkv.policies.SlidingWindow(8), speculate=PromptLookup()),
            "drops tokens; speculation must be able",
        ),
    ],
)
def test_configs_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(tokens=[]), "tokens is empty"),
        (dict(tokens=[-1]), "tokens: token id -1 is out of range"),
        (dict(tokens=[1], seed=2**32), "seed=4294967296"),
        (dict(tokens=[1], max_new_tokens=0), "max_new_tokens=0"),
        (dict(tokens=[1], sampling=0.5), "sampling=0.5 must be a jaxkv.Sampling"),
        (dict(tokens=[1], stop=[""]), "a stop string must be a text"),
    ],
)
def test_requests_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**fields)


# More of everything -------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_requests_through_eight_slots():
    sizes = replace(CONFIG.cache, max_seqs=8, num_pages=40)
    config = replace(CONFIG, cache=sizes, max_requests=64, token_budget=32, widths=(8, 32))
    rng = np.random.default_rng(0)
    requests = (
        Request(tokens=prompt(int(rng.integers(1, 12)), seed), max_new_tokens=int(rng.integers(1, 6)))
        for seed in range(10_000)
    )
    _, ends = served(requests, config, block=16)
    assert len(ends) == 10_000 and set(ends.values()) == {Finish.LENGTH}


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_caches(quantization):
    """Each request gets what it has alone; equal elements are exact in int8, as floats are."""
    dims = 64 if quantization == "int4" else 8
    sizes = replace(CONFIG.cache, head_dim=dims, quantization=quantization)
    config = replace(CONFIG, cache=sizes, widths=(12,))
    requests = [Request(tokens=prompt(9, seed), max_new_tokens=8, num_samples=2) for seed in range(6)]
    texts, _ = served(requests, config)
    for number, request in enumerate(requests):
        by_itself, _ = served([request], config)
        assert texts[number, 0] == texts[number, 1] == by_itself[0, 0] == by_itself[0, 1]
        if quantization != "int4":
            assert texts[number, 0] == alone(request, 0, sizes, config.max_tokens)[0][9:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        jaxkv.policies.SlidingWindow(12, sinks=2),
        jaxkv.policies.HeavyHitter(budget=16, recent=4),
    ],
    ids=["sliding window", "heavy hitter"],
)
def test_policies_bound_the_memory_of_long_texts(policy):
    sizes = replace(CONFIG.cache, prefix_cache=False, num_pages=20, max_pages_per_seq=6)
    config = replace(CONFIG, cache=sizes, policy=policy, max_tokens=90, widths=(12,))
    requests = [Request(tokens=prompt(40, seed), max_new_tokens=45) for seed in range(5)]
    most = []
    texts, ends = served(
        requests, config, on_state=lambda state: most.append(int(jnp.max(jaxkv.lengths(state.cache))))
    )
    assert set(ends.values()) == {Finish.LENGTH} and {len(text) for text in texts.values()} == {45}
    assert max(most) <= 24
