"""Policies at their edges, what they refuse, and `generate` under each."""

from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Rope, Status
from jaxkv.cli.pool import check_context
from jaxkv.decode import Finish
from jaxkv.generating import PREFILL_CHUNK
from jaxkv.models import random_model
from jaxkv.policies import (
    HeavyHitter,
    LeastRecentlyUsed,
    Policy,
    PromptCompress,
    SemanticMerge,
    SlidingWindow,
    TokenPolicy,
    Tokens,
)
from jaxkv.policies.parse import parse_policy
from jaxkv.sizing import token_slots
from tests import jitted
from tests.caches import SMALL, filled, ints, normal
from tests.policy_twin import PolicyTwin
from tests.tiny_model import TINY

ROPE = Rope.of(4, 10000.0)
CONFIG = replace(SMALL, num_pages=12, max_pages_per_seq=6)
POLICIES = [
    SlidingWindow(6, 2),
    LeastRecentlyUsed(9),
    HeavyHitter(9, 3),
    SemanticMerge(9, 3),
    PromptCompress(9, 3, kernel=3),
]
by_name = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)


def generating(*often, of=POLICIES):
    """Whole generations take long to compile: of some policies in every run, of the others in `test-slow`."""
    slow = [[] if _id(policy) in often else [pytest.mark.slow] for policy in of]
    params = [
        pytest.param(policy, marks=marks, id=_id(policy)) for policy, marks in zip(of, slow, strict=True)
    ]
    return pytest.mark.parametrize("policy", params)


def _id(policy):
    return type(policy).__name__ + (", cache positions" if policy.positions == "cache" else "")


def twin_of(policy, **changes):
    return PolicyTwin(policy, config=replace(CONFIG, **changes), total_tokens=24)


@by_name
def test_a_full_pool_of_own_pages_needs_no_page_to_evict(policy):
    twin = twin_of(policy)
    twin.extend([0], [24])
    twin.extend([1], [24])
    assert twin.oracle.num_free == 0
    dropped = twin.evict([0, 1])
    assert min(dropped[:2]) > 0


@pytest.mark.parametrize("policy", POLICIES[1:4], ids=lambda policy: type(policy).__name__)
def test_shared_pages_are_left_alone_and_what_is_kept_goes_to_free_ones(policy):
    twin = twin_of(policy)
    twin.extend([0], [16])
    twin.fork([0], [1])
    twin.extend([2], [20])
    twin.extend([3], [12])
    assert twin.oracle.num_free == 0
    assert twin.evict([0, 1]) == [0, 0], "three pages each, and none is free"
    twin.free([3])
    assert twin.evict([0, 1]) == [7, 0], "there are three, which the first one takes"
    assert twin.oracle.sequences[1].length == 16
    assert twin.evict([1]) == [7], "what it shared is its own by now"


@pytest.mark.parametrize("policy", POLICIES[1:4], ids=lambda policy: type(policy).__name__)
def test_own_pages_beyond_the_budget_take_what_was_in_shared_ones(policy):
    twin = twin_of(policy)
    twin.extend([0], [8])
    twin.fork([0], [1])
    twin.extend([0], [8])
    twin.extend([2], [20])
    twin.extend([3], [12])
    assert twin.oracle.num_free == 0
    assert twin.evict([0]) == [0], "two pages are shared, and it has one of its own to spare"
    twin.free([3])
    assert twin.evict([0]) == [7]
    assert twin.oracle.num_free == 2, "one was taken"
    assert twin.oracle.sequences[1].length == 8


@by_name
def test_what_names_no_sequence_is_passed_over(policy):
    twin = twin_of(policy)
    assert twin.evict([0, -1, 4, 2**31 - 1, 0]) == [0] * 5
    twin.extend([3], [17])
    dropped = twin.evict([-5, 3, 3, 9, 1])
    assert dropped[1] > 0 and sum(dropped) == dropped[1]


@by_name
def test_at_the_budget_and_below_it_nothing_goes(policy):
    twin = twin_of(policy)
    for length in (1, 4, 8, 9, 10):
        twin.extend([0], [length])
        over = 0 if isinstance(policy, SlidingWindow) else max(0, length - 9)
        assert twin.evict([0]) == [over]
        twin.free([0])


@generating("HeavyHitter", "SlidingWindow")
def test_a_hundred_steps_trace_once(policy):
    """Allocate, attend and observe in one donated step, with forks and frees in between."""
    config, traces = replace(CONFIG, max_pages_per_seq=12), []

    @partial(jax.jit, donate_argnums=0)
    def step(cache, seqs, x):
        traces.append(1)
        cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
        mass = []
        for layer in range(config.num_layers):
            cache = jaxkv.append(cache, layer, batch, x, x)
            out, lse = jaxkv.attend(cache, layer, batch, x, return_lse=True)
            mass.append(jaxkv.attention_mass(cache, layer, batch, x, lse))
            x = jaxkv.after(out, mass[-1])
        return jaxkv.observe(cache, batch, jnp.stack(mass)), batch.status

    cache = jaxkv.init(config, policy)
    x = normal(2, 2, 4)
    most = 0
    for number in range(100):
        cache, status = step(cache, ints(0, 1), x)
        most = max(most, int(cache.table.lengths.max()))
        if number == 40:
            cache = jax.jit(jaxkv.free)(cache, ints(1))
    assert len(traces) == 1
    if not isinstance(policy, PromptCompress):
        assert most <= policy.capacity(config) and not np.any(status)
        assert cache.table.positions[0] == 100
    jaxkv.check_invariants(cache)


def test_under_x64_mass_is_float32_still():
    with jax.enable_x64(True):
        cache = jaxkv.init(replace(CONFIG, quantization="int8"))
        cache, batch = jitted.allocate(cache, jnp.arange(2), jnp.array([15, 14]), total_tokens=29)
        x = jnp.ones((29, 2, 4), jnp.float32)
        _, lse = jitted.attend(cache, 0, batch, x, return_lse=True)
        assert jitted.attention_mass(cache, 0, batch, x, lse).dtype == jnp.float32


@generating(
    "SemanticMerge",
    "PromptCompress",
    "SlidingWindow, cache positions",
    of=[*POLICIES, SlidingWindow(5, 0, positions="cache", rope=ROPE)],
)
def test_under_x64_dtypes_stay(policy):
    """With codes, and a policy that goes by the mass, merges, cuts a prompt once, or rotates keys."""
    config = replace(CONFIG, quantization="int8", num_pages=24)
    mass = np.ones((2, 2, 2, config.max_tokens_per_seq), np.float32)

    @jax.jit
    def step(cache):
        cache, batch = jaxkv.allocate(cache, jnp.arange(2), jnp.array([15, 14]), total_tokens=29)
        cache = jaxkv.observe(cache, batch, jnp.asarray(mass))
        cache, _ = jaxkv.fork(cache, jnp.arange(2), jnp.arange(2) + 2)
        dropped = jnp.zeros(2, jnp.int32)
        if policy.once:
            cache, dropped = jaxkv.evict(cache, jnp.arange(2))
        return cache, dropped

    with jax.enable_x64(True):
        before = jaxkv.init(config, policy)
        after, dropped = step(before)
        assert dropped.dtype == jnp.int32
        after, *_ = step(after)
        assert after.stats.evictions > 0
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert new.dtype == old.dtype


# refused --------------------------------------------------------------------------------------

SETTINGS = [
    (lambda: HeavyHitter(0, 0), "budget=0"),
    (lambda: HeavyHitter(8, 9), "budget=8 does not hold recent=9"),
    (lambda: HeavyHitter(8, -1), "recent=-1"),
    (lambda: SemanticMerge(True, 0), "budget=True"),
    (lambda: PromptCompress(8, 16), "budget=8 does not hold observe_last=16"),
    (lambda: PromptCompress(8, 4, kernel=4), "kernel=4 must be odd"),
    (lambda: LeastRecentlyUsed(8, -0.5), "threshold=-0.5"),
    (lambda: LeastRecentlyUsed(8, float("nan")), "threshold=nan"),
    (lambda: SlidingWindow(0), "window=0"),
    (lambda: SlidingWindow(8, -1), "sinks=-1"),
    (lambda: SlidingWindow(8, positions="new"), "positions='new'"),
    (lambda: SlidingWindow(8, positions="cache"), "needs rope"),
    (lambda: SemanticMerge(8, 8), "budget=8 leaves no token"),
    (lambda: SlidingWindow(8, rope=3), "rope=3"),
    (lambda: Rope(()), "frequencies"),
    (lambda: Rope([1.0]), "frequencies"),
    (lambda: Rope((1.0,), "thirds"), "pairing='thirds'"),
]


@pytest.mark.parametrize("make, message", SETTINGS, ids=[message for _, message in SETTINGS])
def test_settings_that_contradict_each_other(make, message):
    with pytest.raises(ValueError, match=message):
        make()


FITS = [
    (HeavyHitter(24, 3), CONFIG, "28 token slots .* a sequence has 24: 6 pages of 4"),
    (SlidingWindow(20, 4), CONFIG, "28 token slots"),
    (SlidingWindow(8, positions="cache", rope=Rope.of(8, 10.0)), CONFIG, "8 features; .* head_dim=4"),
    (HeavyHitter(8, 3, positions="cache", rope=ROPE), replace(CONFIG, quantization="int8"), "quantization"),
]


@pytest.mark.parametrize("policy, config, message", FITS, ids=[message[:12] for *_, message in FITS])
def test_a_policy_that_does_not_fit_the_cache_names_both(policy, config, message):
    with pytest.raises(ValueError, match=message):
        jaxkv.init(config, policy)


@pytest.mark.parametrize("policy", ["lru", HeavyHitter, 0])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(ValueError, match=r"must be a jaxkv\.Policy"):
        jaxkv.init(CONFIG, policy)


def test_a_cache_without_a_policy_has_nothing_of_one():
    """Nothing given up, and nothing to observe; with one that remembers nothing there is one vector more."""
    cache = jaxkv.init(CONFIG)
    assert cache.policy is None
    assert len(jax.tree.leaves(jaxkv.init(CONFIG, SlidingWindow(6, 2)))) == len(jax.tree.leaves(cache)) + 1
    cache, batch = jitted.allocate(cache, ints(0), ints(20), total_tokens=20)
    assert (batch.window, batch.sink_tokens) == (None, 0)
    same, dropped = jaxkv.evict(cache, ints(0))
    assert dropped.tolist() == [0] and same is cache
    assert jaxkv.observe(cache, batch) is cache


@by_name
def test_allocate_does_what_evict_and_allocate_do(policy):
    """Of the sequences whose tokens do not fit their tail page, and of valid entries alone."""
    cache = jaxkv.init(CONFIG, policy)
    seqs, counts = ints(0, 1, 2, -1, -1, -1), ints(16, 18, 13, 0, 0, 0)
    cache, batch = jitted.allocate(cache, seqs, counts, total_tokens=47)
    cache = jitted.observe(cache, batch, jnp.abs(normal(2, 6, 2, 24)))
    seqs, counts = ints(0, 1, 2, 2, 9, -1), ints(1, 2, 0, 9, 4, 4)
    got, got_batch = jitted.allocate(cache, seqs, counts, total_tokens=47)
    want, dropped = jitted.evict(cache, ints(0)) if not policy.once else (cache, ints(0))
    assert (dropped[0] > 0) != policy.once
    want, want_batch = jitted.allocate(replace(want, policy=None), seqs, counts, total_tokens=47)
    for mine, theirs in zip(*(jax.tree.leaves(x.table) for x in (got, want)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(got.stats.counters, want.stats.counters)
    np.testing.assert_array_equal(got_batch.status, want_batch.status)
    np.testing.assert_array_equal(got_batch.page_ids, want_batch.page_ids)
    assert got_batch.status.tolist()[:4] == [Status.OK, Status.OK, Status.OK, Status.INVALID_SEQ]


def test_a_batch_carries_the_window_of_its_cache():
    cache = jaxkv.init(CONFIG, SlidingWindow(6, 2))
    _, batch = jitted.allocate(cache, ints(0), ints(1))
    assert (batch.window, batch.sink_tokens) == (6, 2)


def test_what_is_given_up_stands_though_the_entry_is_refused():
    cache = jaxkv.init(replace(CONFIG, num_pages=6), SlidingWindow(6, 2))
    cache, _ = jitted.allocate(cache, ints(0, 1), ints(20, 4), total_tokens=24)
    cache, batch = jitted.allocate(cache, ints(0), ints(12), total_tokens=12)
    assert batch.status.tolist() == [Status.OUT_OF_PAGES], "two pages are given up, and three needed"
    assert (cache.table.positions[0], cache.table.lengths[0], cache.table.num_free) == (20, 12, 2)
    jaxkv.check_invariants(cache)


def test_a_sequence_without_pages_for_what_it_keeps_waits_and_holds_back_no_other():
    cache, _ = filled(replace(CONFIG, num_pages=6), (12, 0, 0, 1), policy=HeavyHitter(9, 3))
    cache, _ = jitted.fork(cache, ints(0), ints(1))
    after, batch = jitted.allocate(cache, ints(0, 2), ints(1, 1))
    assert batch.status.tolist() == [Status.OUT_OF_PAGES, Status.OK], "two pages are free, and three needed"
    assert after.table.lengths.tolist() == [12, 12, 1, 1]
    after, batch = jitted.allocate(jitted.free(after, ints(1)), ints(0, 2), ints(1, 1))
    assert batch.status.tolist() == [Status.OK, Status.OK]
    assert after.table.lengths.tolist() == [10, 0, 2, 1]
    jaxkv.check_invariants(after)


def test_a_policy_that_goes_by_attention_must_be_given_it(no_shape_checks):
    cache, batch = jitted.allocate(jaxkv.init(CONFIG, HeavyHitter(8, 3)), ints(0), ints(1))
    with pytest.raises(ValueError, match=r"HeavyHitter .* jaxkv.attention_mass"):
        jaxkv.observe(cache, batch)
    with pytest.raises(ValueError, match=r"\[2, 1, 2, 24\], .* not \[1, 2, 24\]"):
        jaxkv.observe(cache, batch, jnp.zeros((1, 2, 24)))


LINES = [
    ("", "not one of sliding-window, lru"),
    ("fifo:3", "'fifo' is not one of"),
    ("lru", "lru:TOKENS"),
    ("lru:", "lru:TOKENS"),
    ("lru:many", "budget='many' is not an integer"),
    ("lru:8,recent=3", "'recent=3' is not one of positions=, threshold="),
    ("heavy-hitter:8,recent", "'recent' is not one of"),
    ("heavy-hitter:8,recent=2,recent=3", "once each"),
    ("heavy-hitter:8,recent=9", "budget=8"),
    ("sliding-window:8,rope=1", "'rope=1' is not one of"),
    ("sliding-window:-8", "window=-8"),
    ("prompt-compress:8,observe=9", "observe_last=9"),
]


@pytest.mark.parametrize("line, message", LINES)
def test_a_line_of_text_that_is_no_policy(line, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(line)


def test_lines_of_text():
    assert parse_policy("sliding-window:1024, sinks=4") == SlidingWindow(1024, 4)
    assert parse_policy("heavy-hitter:9") == HeavyHitter(9, 7)
    assert parse_policy("prompt-compress:16") == PromptCompress(16, 8)
    assert parse_policy("lru:512,threshold=0.5") == LeastRecentlyUsed(512, 0.5)
    assert parse_policy("prompt-compress:64,observe=8") == PromptCompress(64, 8)
    by_cache = parse_policy("semantic-merge:64,recent=8,positions=cache", rope=ROPE)
    assert by_cache == SemanticMerge(64, 8, positions="cache", rope=ROPE)


@pytest.mark.parametrize("positions, most", [("original", TINY.max_context - 60), ("cache", 128 - 9)])
def test_a_prompt_that_is_cut_goes_on_to_the_end_of_the_context(positions, most):
    """All that is generated stays, from where the prompt ended or from where it was cut to."""
    policy = PromptCompress(9, 3, positions=positions, rope=TINY.rope if positions == "cache" else None)
    loaded = SimpleNamespace(config=TINY, name="tiny")

    def slots(new):
        options = Namespace(max_new_tokens=new, page_size=4, policy="prompt-compress:9")
        check_context(loaded, "prompt 0", 60, options, policy)
        return token_slots(TINY.cache_config, 4, 60, new, policy, PREFILL_CHUNK)

    assert slots(1) == 60 and slots(most) == 12 + most
    with pytest.raises(jaxkv.SequenceTooLongError, match=r"reach position 129 .* trained on 128"):
        slots(most + 1)


# generate -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return random_model(TINY, jax.random.key(3))


def cache_config(**changes):
    sizes = dict(num_pages=40, page_size=4, max_seqs=4, max_pages_per_seq=10, dtype="float32")
    return TINY.cache_config(**{**sizes, **changes})


PROMPTS = [[*range(1, 9), 11], [*range(1, 9), 21, 22, 23, 24, 25, 26]]
SAMPLED = dict(
    max_new_tokens=10, num_samples=2, key=jax.random.key(1), sampling=jaxkv.Sampling(temperature=1.0)
)


@pytest.fixture(scope="module")
def without_policy(model):
    return jaxkv.generate(model, cache_config(), PROMPTS, **SAMPLED).tokens


@generating("HeavyHitter", of=[POLICIES[0], POLICIES[2]])
def test_within_its_budget_a_policy_changes_nothing(model, policy, without_policy):
    roomy = replace(policy, **{"window" if isinstance(policy, SlidingWindow) else "budget": 28})
    got = jaxkv.generate(model, cache_config(), PROMPTS, policy=roomy, **SAMPLED)
    assert got.tokens == without_policy and int(got.cache.stats.evictions) == 0


def test_pages_that_a_window_gave_back_change_nothing(model):
    """The same text as from a cache that keeps all, and hides what lies outside of the window."""

    class KeepsAll(SlidingWindow):
        def capacity(self, config):
            return config.max_tokens_per_seq

        def evict(self, cache, slot):
            return cache, jnp.zeros_like(slot)

    options = dict(max_new_tokens=60, prefill_chunk=5)
    want = jaxkv.generate(
        model, cache_config(max_pages_per_seq=20), PROMPTS, policy=KeepsAll(10, 3), **options
    )
    got = jaxkv.generate(
        model,
        cache_config(num_pages=10, max_pages_per_seq=5),
        PROMPTS,
        policy=SlidingWindow(10, 3),
        **options,
    )
    assert got.tokens == want.tokens
    assert got.peak_pages <= 10 < want.peak_pages


def test_a_window_moves_over_a_long_text_with_as_many_pages(model):
    """A thousand tokens, far beyond the positions that the model knows; compiled once."""
    policy = SlidingWindow(24, 4, positions="cache", rope=TINY.rope)
    config, pages, positions = cache_config(num_pages=8, max_seqs=1, max_pages_per_seq=8), [], []

    def see(state):
        pages.append(int(state.cache.stats.current_pages))
        positions.append(int(state.cache.table.positions[0]))

    compiled = decode_programs()
    result = jaxkv.generate(
        model,
        config,
        [list(range(1, 60))],
        max_new_tokens=1000,
        block=100,
        on_tokens=see,
        policy=policy,
        sampling=jaxkv.Sampling(temperature=1.0),
    )
    assert result.num_new_tokens == 1000 and decode_programs() == compiled + 1
    settled = pages[2:-1]
    assert max(settled) == min(settled) == policy.capacity(config) // config.page_size
    assert max(positions) <= policy.most_positions(config)
    assert int(result.cache.stats.evicted_tokens) > 900


def decode_programs():
    from jaxkv.generating import _decode

    return _decode._cache_size()


@generating("HeavyHitter")
def test_prompts_longer_than_a_row_and_forks(model, policy):
    """A prefix that all share, prompts in chunks, samples: every sequence stays within its budget."""
    prompts = [[*range(1, 33), *range(40, 40 + count)] for count in (3, 9)]
    pages = 11 if isinstance(policy, PromptCompress) else 5
    config = cache_config(max_pages_per_seq=pages, num_pages=4 * pages)
    spotted = []

    def see(state):
        jaxkv.check_invariants(state.cache)
        spotted.append(int(state.cache.table.lengths.max()))

    result = jaxkv.generate(
        model,
        config,
        prompts,
        max_new_tokens=12,
        num_samples=2,
        policy=policy,
        on_tokens=see,
        block=4,
        prefill_chunk=7,
    )
    assert result.num_new_tokens == 48
    # At first there are what it keeps and a chunk; after a page it is within bounds.
    kept = policy.budget + 12 if isinstance(policy, PromptCompress) else policy.capacity(config)
    assert len(spotted) == 4 and max(spotted[1:]) <= kept
    assert int(result.cache.stats.evictions) > 0


@generating(of=[*POLICIES, SlidingWindow(6, 2, positions="cache", rope=TINY.rope)])
def test_what_else_is_in_the_batch_changes_nothing(model, policy):
    """Two prompts that begin alike, and one between them whose pieces do not fill the chunks."""
    prompts = [[*range(1, 30), 40, 41], [50, 51, 52], [*range(1, 30), 42, *range(20, 33)]]
    config = cache_config(num_pages=60, max_pages_per_seq=20 if isinstance(policy, PromptCompress) else 6)
    options = dict(max_new_tokens=12, policy=policy, prefill_chunk=10)
    together = jaxkv.generate(model, config, prompts, **options)
    for prompt, tokens in zip(prompts, together.tokens, strict=True):
        assert jaxkv.generate(model, config, [prompt], **options).tokens == [tokens]


@pytest.mark.parametrize("num_pages", [7, pytest.param(10, marks=pytest.mark.slow)])
def test_samples_wait_for_pages_of_their_own(model, num_pages):
    """Four samples share their prompt; with too few pages for copies they wait for each other, and none goes
    on beyond its budget and a page."""
    config, policy = cache_config(num_pages=num_pages, max_pages_per_seq=6), HeavyHitter(12, 4)

    def see(state):
        assert int(state.cache.table.lengths.max()) <= policy.capacity(config)

    result = jaxkv.generate(
        model,
        config,
        [list(range(1, 13))],
        max_new_tokens=20,
        num_samples=4,
        policy=policy,
        on_tokens=see,
        block=1,
    )
    jaxkv.check_invariants(result.cache)
    for tokens, finish in zip(result.tokens[0], result.finish[0], strict=True):
        assert (len(tokens) == 20) == (finish == Finish.LENGTH)
    assert Finish.LENGTH in result.finish[0]


def test_a_prompt_is_cut_once():
    cache = jaxkv.init(CONFIG, PromptCompress(8, 3))
    cache, batch = jitted.allocate(cache, ints(0), ints(20), total_tokens=20)
    observed = jitted.observe(cache, batch, jnp.ones((2, 1, 2, 24)))
    cache, dropped = jitted.evict(observed, ints(0))
    assert dropped[0] == 12
    cache, _ = jitted.allocate(cache, ints(0), ints(12), total_tokens=20)
    assert jitted.evict(cache, ints(0))[1][0] == 0
    # Nor is another sequence of the slot, for what the one before it looked at.
    again, _ = jitted.allocate(jitted.free(observed, ints(0)), ints(0), ints(20), total_tokens=20)
    assert jitted.evict(again, ints(0))[1][0] == 0


def test_a_models_own_window_rules_where_it_is_smaller():
    @jax.jit
    def write_and_attend(cache):
        cache, batch = jaxkv.allocate(cache, ints(0), ints(16), total_tokens=16)
        x = normal(16, 2, 4)
        cache = jaxkv.append(cache, 0, batch, x, x)
        return jaxkv.attend(cache, 0, batch, x, window=6)

    got = [write_and_attend(jaxkv.init(CONFIG, policy)) for policy in (SlidingWindow(12, 4), None)]
    np.testing.assert_array_equal(*got)


def test_a_slot_that_was_used_before_ranks_as_a_new_one():
    policy = LeastRecentlyUsed(4, 0.5)
    kept = []
    for clock in (0, 10**9):
        used = jnp.array([[[8, 1, 2, 3, 4, 5, 6, 7, clock, clock]]], jnp.int32)
        place = jnp.arange(10, dtype=jnp.int32)[None, None, :]
        tokens = Tokens({"used": used}, None, place, jnp.full((1, 1, 1), 8))
        kept.append(jnp.argsort(policy.rank(tokens)[0, 0, :8]).tolist())
    assert kept[0] == kept[1]


def test_a_long_run_of_like_tokens_stays_in_their_range():
    """Values near the most that float16 holds, after a token that takes nearly all attention, adding none."""
    config = replace(CONFIG, dtype="float16")
    cache = jaxkv.init(config, SemanticMerge(3, 1))
    cache, batch = jitted.allocate(cache, ints(0), ints(20), total_tokens=20)
    k = jnp.ones((20, config.num_kv_heads, config.head_dim)).at[0].multiply(jnp.array([1.0, -1.0, 1.0, -1.0]))
    v = jnp.full_like(k, 60000.0).at[0].set(0.0)
    for layer in range(config.num_layers):
        cache = jitted.append(cache, layer, batch, k.astype("float16"), v.astype("float16"))
    mass = jnp.ones((config.num_layers, 1, config.num_kv_heads, config.max_tokens_per_seq))
    cache = jitted.observe(cache, batch, mass.at[..., 0].set(1e6))
    cache, dropped = jitted.evict(cache, ints(0))
    _, left, _ = jitted.gather(cache, 0, ints(0))
    assert dropped[0] == 17
    np.testing.assert_array_equal(left[0, :3, :, 0], [[0] * 2, [60000] * 2, [60000] * 2])


def test_a_policy_from_scratch_needs_evict_alone(model, without_policy):
    class Nothing(Policy):
        def evict(self, cache, slot):
            return cache, jnp.zeros_like(slot)

    got = jaxkv.generate(model, cache_config(), PROMPTS, policy=Nothing(), **SAMPLED)
    assert got.tokens == without_policy


def test_a_policy_of_ones_own(model):
    @dataclass(frozen=True)
    class Thin(TokenPolicy):
        def rank(self, tokens):
            kept = (tokens.indices < 4) | (tokens.indices >= tokens.lengths - self.budget // 2)
            return jnp.where(kept, 2, tokens.indices % 2)

    result = jaxkv.generate(
        model, cache_config(max_pages_per_seq=5), PROMPTS, max_new_tokens=40, policy=Thin(16)
    )
    assert result.num_new_tokens == 80 and int(result.cache.stats.evicted_tokens) > 40


def test_what_generate_refuses(model):
    class Plain:
        def __call__(self, tokens, cache, batch, *, rows=None):
            raise AssertionError

    with pytest.raises(ValueError, match=r"HeavyHitter .* Plain does not accept return_mass"):
        jaxkv.generate(Plain(), cache_config(), PROMPTS, policy=HeavyHitter(8, 4))
    with pytest.raises(ValueError, match=r"policy='lru' must be"):
        jaxkv.generate(model, cache_config(), PROMPTS, policy="lru")
    with pytest.raises(ValueError, match=r"44 token slots .* a sequence has 40"):
        jaxkv.generate(model, cache_config(), PROMPTS, policy=HeavyHitter(40, 4))
    with pytest.raises(jaxkv.SequenceTooLongError, match="prompt 0 has 60 tokens"):
        jaxkv.generate(model, cache_config(), [[1] * 60], policy=PromptCompress(8, 4))
    with pytest.raises(jaxkv.OutOfPagesError):
        jaxkv.generate(model, cache_config(num_pages=10), [[1] * 60] * 4, policy=SlidingWindow(28, 4))
