"""A step is traced once, whatever happens to be in the cache."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheConfig, Status
from tests import jitted
from tests.caches import ints, normal

CONFIG = CacheConfig(
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    num_pages=40,
    page_size=8,
    max_seqs=4,
    max_pages_per_seq=16,
    dtype="float32",
)


@pytest.fixture(autouse=True)
def fresh_trace_counters():
    chex.clear_trace_counter()


def decode(cache, seqs, q):
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    for layer in range(CONFIG.num_layers):
        k, v = q[:, :2], q[:, 2:]
        cache = jaxkv.append(cache, layer, batch, k, v)
        q = jaxkv.attend(cache, layer, batch, q)
    return cache, batch.status, q


@contextmanager
def compilations():
    """A list of what is compiled in the meantime."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_outside_jit_nothing_compiles_again_and_only_writes_copy_the_pool():
    """Eagerly nothing is donated: an operation that leaves the pool as it is returns the same arrays."""
    cache = jaxkv.init(replace(CONFIG, num_pages=41))  # of no other test, so that the first round compiles

    def steps(cache):
        grown, batch = jaxkv.allocate(cache, ints(0, 1), ints(5, 3), total_tokens=8)
        kept, q = [grown], normal(8, 4, 8)
        written = jaxkv.append(grown, 0, batch, q[:, :2], q[:, 2:])
        attended = jaxkv.attend(written, 0, batch, q)
        for operation in (
            lambda cache: jaxkv.fork(cache, ints(0), ints(2))[0],
            lambda cache: jaxkv.truncate(cache, ints(1), ints(2))[0],
            lambda cache: jaxkv.reorder(cache, ints(0, 1), ints(0, 1))[0],
            lambda cache: jaxkv.free(cache, ints(0)),
        ):
            kept.append(operation(kept[-1]))
        return kept, written, attended

    with compilations() as at_first:
        first = steps(cache)
    with compilations() as again:
        chex.assert_trees_all_equal(first, steps(cache))
    assert at_first and not again
    for at in first[0]:
        assert at.pool is cache.pool


def test_outside_jit_the_first_write_to_a_shared_tail_page_goes_to_a_copy():
    cache, batch = jaxkv.allocate(jaxkv.init(CONFIG), ints(0), ints(5), total_tokens=5)
    k = normal(5, 2, 8)
    for layer in range(CONFIG.num_layers):
        cache = jaxkv.append(cache, layer, batch, k, -k)
    cache, _ = jaxkv.fork(cache, ints(0), ints(1))
    alone, batch = jaxkv.allocate(cache, ints(1), ints(1))
    inside, same = jax.jit(jaxkv.allocate)(cache, ints(1), ints(1))
    chex.assert_trees_all_equal((alone, batch), (inside, same))
    assert alone.stats.copy_on_write_copies == 1
    assert alone.pool is not cache.pool
    np.testing.assert_array_equal(jaxkv.gather(alone, 1, ints(1))[0][0, :5], k)


def test_a_hundred_decode_steps_trace_once():
    step = jax.jit(chex.assert_max_traces(decode, n=1), donate_argnums=0)
    cache = jaxkv.init(CONFIG)
    lives = np.zeros(4, int)
    for number in range(100):
        slots = [slot if number % (slot + 2) else -1 for slot in range(4)]
        cache, status, _ = step(cache, ints(*slots), normal(4, 4, 8, seed=number))
        lives += np.asarray(status) == Status.OK
    assert cache.table.lengths.tolist() == lives.tolist()


def test_every_operation_traces_once_over_a_changing_cache():
    @partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def shuffle(cache, slots, counts, lengths):
        cache, _ = jaxkv.allocate(cache, slots, counts, total_tokens=16)
        cache, _ = jaxkv.fork(cache, slots, slots[::-1])
        cache, _ = jaxkv.truncate(cache, slots, lengths)
        cache = jaxkv.free(cache, slots[:2])
        return jaxkv.compact(cache)[0]

    cache, random = jaxkv.init(CONFIG), np.random.default_rng(0)
    for _ in range(10):
        counts, lengths = random.integers(0, 9, size=(2, 4))
        cache = shuffle(cache, ints(*random.permutation(4)), ints(*counts), ints(*lengths))
    jaxkv.check_invariants(cache)


def test_a_traced_layer_serves_every_layer_with_one_trace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def one_layer(cache, layer, batch, k, q):
        cache = jaxkv.append(cache, layer, batch, k, k)
        return cache, jaxkv.attend(cache, layer, batch, q), jaxkv.gather(cache, layer, batch.seqs)

    cache, batch = jitted.allocate(jaxkv.init(CONFIG), ints(0, 1), ints(1, 1))
    for layer in range(CONFIG.num_layers):
        cache, *_ = one_layer(cache, layer, batch, normal(2, 2, 8), normal(2, 4, 8))


def test_a_whole_generation_is_one_program():
    """Sequences end inside the loop, and others take the pages they leave."""

    @partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def generate(cache, q):
        def step(number, carry):
            cache, q, served = carry
            slots = jnp.arange(4, dtype=jnp.int32)
            cache, status, q = decode(cache, slots, q)
            ends = (cache.table.lengths >= 8 * (slots + 1)) | (status != Status.OK)
            cache = jaxkv.free(cache, jnp.where(ends, slots, -1))
            return cache, q, served + jnp.sum(status == Status.OK, dtype=jnp.int32)

        return jax.lax.fori_loop(0, 200, step, (cache, q, jnp.int32(0)))

    cache, q, served = generate(jaxkv.init(CONFIG), normal(4, 4, 8))
    assert served == 800
    assert np.isfinite(q).all()
    assert cache.stats.total_allocations > CONFIG.num_pages
    jaxkv.check_invariants(cache)


def test_configs_of_equal_value_share_a_trace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def free(cache):
        return jaxkv.free(cache, ints(0))

    for _ in range(2):
        free(jaxkv.init(CacheConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__})))
