"""Matching, recording and reclaiming inside a user's compiled loop, and under JAX's transformations."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Status
from tests import jitted
from tests.texts import MOST, TEXTS, numbers

REQUESTS = 40
SLOTS = TEXTS.max_seqs


def requests(seed, count=REQUESTS):
    """Prompts of few tokens that often begin alike: rows, lengths, salts, and what each slot must hold."""
    random = np.random.default_rng(seed)
    rows = np.repeat(random.integers(0, 2, (count, 4)), 4, axis=1).astype(np.int32)
    lengths = random.integers(1, MOST, count).astype(np.int32)
    salts = random.integers(0, 2, count).astype(np.int32)
    values = np.stack([numbers(row, salt) for row, salt in zip(rows, salts, strict=True)])
    return rows, lengths, salts, values


def serve(cache, request):
    """One request in the next slot: what that slot left is freed, the prompt matched, computed, recorded."""
    number, tokens, length, salt, values = request
    slot = (number % SLOTS)[None]
    cache = jaxkv.free(cache, slot)
    cache, matched = jaxkv.match_prefix(cache, slot, tokens[None], length[None], salt=salt[None])
    cache, batch = jaxkv.allocate(cache, slot, length[None] - matched, total_tokens=MOST)
    k = jnp.broadcast_to(jnp.roll(values, -matched[0])[:, None, None], (MOST, 1, TEXTS.head_dim))
    cache = jaxkv.append(cache, 0, batch, k, -k)
    out = jaxkv.attend(cache, 0, batch, k)
    cache = jaxkv.record_prefix(cache, slot, tokens[None], length[None], salt=salt[None])
    # Every third is done at once; others live until their slot's next request, or leave their last page.
    cache = jaxkv.free(cache, jnp.where(number % 3 == 0, slot, -1))
    return cache, (matched[0], batch.status[0], jnp.where(batch.ok[0], out[batch.last_rows[0], 0, 0], 0.0))


def stream(*of_requests):
    return jnp.arange(len(of_requests[0]), dtype=jnp.int32), *map(jnp.asarray, of_requests)


def one_by_one(cache, some):
    step, results = jax.jit(serve), []
    for number in range(len(some[0])):
        cache, result = step(cache, jax.tree.map(lambda x, n=number: x[n], some))
        results.append(result)
    return cache, jax.tree.map(lambda *x: np.stack(x), *results)


@pytest.fixture(scope="module")
def outside():
    """The loop outside `jit`, of two streams of requests."""
    return [one_by_one(jitted.init(TEXTS), stream(*requests(seed))) for seed in (0, 1)]


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


def test_the_loop_matches_and_reclaims_and_every_text_is_right(outside):
    for seed, (cache, (matched, status, _)) in enumerate(outside):
        _rows, lengths, _salts, values = requests(seed)
        jaxkv.check_invariants(cache)
        assert matched.sum() > 50 and cache.stats.prefix_pages_reclaimed > 10
        assert set(status.tolist()) <= {Status.OK, Status.OUT_OF_PAGES}
        for number in range(REQUESTS - SLOTS, REQUESTS):
            k, _, length = jitted.gather(cache, 0, jnp.array([number % SLOTS], jnp.int32))
            served = status[number] == Status.OK
            want = 0 if number % 3 == 0 else lengths[number] if served else matched[number]
            assert length[0] == want
            np.testing.assert_array_equal(k[0, :want, 0, 0], values[number][:want])


def test_a_scan_with_donation_serves_as_the_loop_outside_does(outside):
    run = jax.jit(partial(jax.lax.scan, serve), donate_argnums=0)
    before = jaxkv.init(TEXTS)
    got = run(before, stream(*requests(0)))
    assert before.pool.k.is_deleted()
    same(got, outside[0])


@pytest.mark.slow
def test_two_caches_are_served_at_once_as_each_alone(outside):
    def run(cache, some):
        return jax.lax.scan(serve, cache, some)

    caches, streams = (
        jax.tree.map(lambda *x: jnp.stack(x), *pair)
        for pair in ([jitted.init(TEXTS)] * 2, [stream(*requests(seed)) for seed in (0, 1)])
    )
    caches, results = jax.jit(jax.vmap(run))(caches, streams)
    for nth in range(2):
        same(jax.tree.map(lambda x, n=nth: x[n], (caches, results)), outside[nth])


def test_a_thousand_steps_trace_once():
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(serve, n=1), donate_argnums=0)
    cache, some = jitted.init(TEXTS), jax.device_get(stream(*requests(2, 1000)))
    for number in range(1000):
        cache, _ = step(cache, tuple(x[number] for x in some))
    jaxkv.check_invariants(cache)
    stats = cache.stats
    assert stats.prefix_queries == 1000
    assert stats.prefix_tokens_matched > 1000 and stats.prefix_pages_reclaimed > 300


@pytest.mark.slow
def test_clear_prefixes_under_jit_and_scan():
    """New weights every fifth request: nothing recorded before them is found."""

    def step(cache, request):
        new = request[0] % 5 == 0
        cleared = jaxkv.clear_prefixes(cache)
        cache = jax.tree.map(lambda one, other: jnp.where(new, one, other), cleared, cache)
        return serve(cache, request)

    cache, (matched, _, _) = jax.jit(partial(jax.lax.scan, step))(jitted.init(TEXTS), stream(*requests(3)))
    jaxkv.check_invariants(cache)
    assert not matched[::5].any() and matched.any()
