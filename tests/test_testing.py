"""The assertions for users' tests pass where they should and say what is wrong where they should not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import jaxkv
from jaxkv import policies
from jaxkv.testing import assert_caches_equivalent, assert_in_place, assert_invariants
from tests import jitted
from tests.caches import SMALL, filled, ints

LAYERS = 2
CONFIG = jaxkv.CacheConfig(
    num_layers=LAYERS,
    num_kv_heads=2,
    head_dim=64,
    num_pages=1024,
    max_seqs=8,
    max_pages_per_seq=64,
    dtype="float32",
)
CACHE = jax.eval_shape(lambda: jaxkv.init(CONFIG))
SLOTS = jax.ShapeDtypeStruct((8,), jnp.int32)


# Same contents ----------------------------------------------------------------------------------


def test_a_cache_is_equivalent_to_itself_and_to_its_copy_with_other_pages():
    cache, _ = filled(SMALL, (6, 5, 1))
    assert_caches_equivalent(cache, cache)
    assert_caches_equivalent(cache, filled(replace(SMALL, page_size=3, num_pages=9), (6, 5, 1))[0])


def test_sharing_pages_or_not_is_no_difference():
    shared, _ = jitted.fork(filled(SMALL, (6,))[0], ints(0), ints(2))
    twice, batch = jitted.allocate(jaxkv.init(SMALL), ints(0, 2), ints(6, 6), total_tokens=12)
    for layer in range(SMALL.num_layers):
        k, v, _ = jitted.gather(shared, layer, ints(0, 2))
        k, v = (dense[:, :6].reshape(12, 2, 4) for dense in (k, v))
        twice = jitted.append(twice, layer, batch, k, v)
    assert_caches_equivalent(shared, twice)


def test_another_length_is_a_difference():
    cache, _ = filled(SMALL, (6, 5))
    with pytest.raises(AssertionError, match=r"lengths\[1\].*5.*4"):
        assert_caches_equivalent(cache, jitted.truncate(cache, ints(1), ints(4))[0])


def test_another_position_is_a_difference():
    cache, _ = filled(SMALL, (6, 5))
    table = replace(cache.table, positions=cache.table.positions + 1)
    with pytest.raises(AssertionError, match=r"positions\[0\]"):
        assert_caches_equivalent(cache, replace(cache, table=table))


@pytest.mark.parametrize("name", ["k", "v"])
def test_one_other_value_is_a_difference(name):
    cache, _ = filled(SMALL, (6, 5))
    pool = getattr(cache.pool, name)
    page = cache.table.pages[1, 1]
    pool = pool.at[1, page, 1, 0, 3].add(2.0**-20)
    other = replace(cache, pool=replace(cache.pool, **{name: pool}))
    with pytest.raises(AssertionError, match=f"{name} of slot 1 .*layer 1 at token 4"):
        assert_caches_equivalent(cache, other)


def test_another_shape_is_a_difference():
    with pytest.raises(AssertionError, match=r"max_seqs.*4.*5"):
        assert_caches_equivalent(jaxkv.init(SMALL), jaxkv.init(replace(SMALL, max_seqs=5)))


def test_a_broken_cache_fails_the_assertion():
    cache = jaxkv.init(SMALL)
    assert_invariants(cache)
    table = replace(cache.table, num_free=cache.table.num_free - 1)
    with pytest.raises(AssertionError, match="page 0"):
        assert_invariants(replace(cache, table=table))


# In place ---------------------------------------------------------------------------------------


def one_layer(cache, layer, batch, q):
    """As in a model, what a layer writes depends on what the layer before it read."""
    k, v = q[:, :2], q[:, 2:]
    cache = jaxkv.append(cache, layer, batch, k, v)
    return cache, jaxkv.attend(cache, layer, batch, q)


def decode(cache, seqs, q):
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    for layer in range(LAYERS):
        cache, q = one_layer(cache, layer, batch, q)
    return cache, q


def scanned(cache, seqs, q):
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))

    def step(carry, layer):
        cache, q = carry
        return one_layer(cache, layer, batch, q), None

    return jax.lax.scan(step, (cache, q), jnp.arange(LAYERS, dtype=jnp.int32))[0]


def generation(cache, seqs, q):
    def step(_, carry):
        cache, q = carry
        cache, q = scanned(cache, seqs, q)
        return jaxkv.free(cache, jnp.where(jnp.sum(q[:, 0, 0]) > 1e6, seqs, -1)), q

    return jax.lax.fori_loop(0, 10, step, (cache, q))


def decode_with_mass(cache, seqs, q):
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    masses = []
    for layer in range(LAYERS):
        cache = jaxkv.append(cache, layer, batch, q[:, :2], q[:, 2:])
        out, lse = jaxkv.attend(cache, layer, batch, q, return_lse=True)
        masses.append(jaxkv.attention_mass(cache, layer, batch, q, lse))
        q = jaxkv.after(out, masses[-1])
    return jaxkv.observe(cache, batch, jnp.stack(masses)), q, jnp.stack(masses)


K = jax.ShapeDtypeStruct((8, 2, 64), jnp.float32)
Q = jax.ShapeDtypeStruct((8, 4, 64), jnp.float32)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        (jaxkv.allocate, (SLOTS, SLOTS)),
        (jaxkv.fork, (SLOTS, SLOTS)),
        (jaxkv.reorder, (SLOTS, SLOTS)),
        (jaxkv.free, (SLOTS,)),
        (jaxkv.truncate, (SLOTS, SLOTS)),
        (decode, (SLOTS, Q)),
        (scanned, (SLOTS, Q)),
        (generation, (SLOTS, Q)),
        (decode_with_mass, (SLOTS, Q)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_donated_operation_keeps_no_copy_of_the_pool(operation, arguments):
    assert_in_place(operation, CACHE, *arguments)


@pytest.mark.parametrize("quantization", ["int8", "fp8", "int4"])
@pytest.mark.parametrize(
    "operation",
    [scanned, *(pytest.param(operation, marks=pytest.mark.slow) for operation in (jaxkv.allocate, decode))],
)
def test_nor_do_codes_become_a_pool_of_values(operation, quantization):
    config = replace(CONFIG, quantization=quantization)
    cache = jax.eval_shape(lambda: jaxkv.init(config))
    assert_in_place(operation, cache, SLOTS, SLOTS if operation is jaxkv.allocate else Q)


# Each last layer of three has full attention. Of two shapes, its pages hold as many tokens as the others'.
WINDOWS = replace(CONFIG, num_layers=6, num_pages=2048, layer_windows=(32, 32, None) * 2, max_chunk=64)
TWO_SHAPES = replace(
    WINDOWS, layer_kv_heads=(2, 2, 1) * 2, layer_head_dims=(64, 64, 128) * 2, max_pages_per_seq=64
)


def decode_of_kinds(cache, seqs, x):
    """A decode step in which heads are as wide as a layer's kind has them."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    for layer, home in enumerate(cache.config.homes):
        kind = cache.config.groups[home.group]
        q = x.reshape(x.shape[0], -1, kind.head_dim)
        k = q[:, : kind.num_kv_heads]
        cache = jaxkv.append(cache, layer, batch, k, k)
        x = jaxkv.attend(cache, layer, batch, q).reshape(x.shape)
    return cache, x


OF_KINDS = [jaxkv.allocate, jaxkv.fork, jaxkv.free, jaxkv.truncate, decode_of_kinds]


# Each operation with layers of two shapes, a step with each; the other combinations in `make test-slow`.
@pytest.mark.parametrize(
    ("operation", "config", "quantization"),
    [
        *(pytest.param(operation, TWO_SHAPES, None, id=operation.__name__) for operation in OF_KINDS),
        pytest.param(decode_of_kinds, WINDOWS, None, id="decode_of_kinds, one shape"),
        pytest.param(decode_of_kinds, TWO_SHAPES, "int8", id="decode_of_kinds, int8"),
        *(
            pytest.param(operation, config, quantization, marks=pytest.mark.slow)
            for operation in OF_KINDS
            for config in (WINDOWS, TWO_SHAPES)
            for quantization in (None, "int8")
            if (config, quantization) != (TWO_SHAPES, None)
            if operation is not decode_of_kinds or (config, quantization) == (WINDOWS, "int8")
        ),
    ],
)
def test_nor_do_layers_of_two_kinds(operation, config, quantization):
    config = replace(config, quantization=quantization)
    assert len({group.shape for group in config.groups}) == 2
    cache = jax.eval_shape(lambda: jaxkv.init(config))
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    others = {jaxkv.free: (), decode_of_kinds: (x,)}.get(operation, (SLOTS,))
    assert_in_place(operation, cache, SLOTS, *others)


def test_compact_keeps_a_chunk_and_no_pool():
    config = replace(CONFIG, num_pages=4096)
    cache = jax.eval_shape(lambda: jaxkv.init(config))
    assert_in_place(jaxkv.compact, cache, max_temp_bytes=40 * 2**20)


ROPE = jaxkv.Rope.of(64, 10000.0)
POLICIES = [
    policies.SlidingWindow(500, 4, positions="cache", rope=ROPE),
    policies.LeastRecentlyUsed(512),
    policies.HeavyHitter(512, 64, positions="cache", rope=ROPE),
    policies.SemanticMerge(512, 64),
    policies.PromptCompress(512, 64),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_an_eviction_keeps_some_sequences_tokens_and_no_pool(policy):
    config = replace(CONFIG, num_pages=8192)
    cache = jax.eval_shape(lambda: jaxkv.init(config, policy))
    assert_in_place(jaxkv.evict, cache, SLOTS)


@pytest.mark.parametrize(
    "policy",
    [POLICIES[2], pytest.param(POLICIES[0], marks=pytest.mark.slow)],
    ids=lambda policy: type(policy).__name__,
)
def test_nor_does_a_step_that_may_evict(policy):
    """A whole decode step, which allocates, and observes too."""
    config = replace(CONFIG, num_pages=8192)
    cache = jax.eval_shape(lambda: jaxkv.init(config, policy))
    assert_in_place(decode_with_mass, cache, SLOTS, Q)


@pytest.mark.parametrize("operation", [jaxkv.fork, jaxkv.reorder, jaxkv.truncate])
def test_nor_do_operations_that_a_policys_state_follows(operation):
    cache = jax.eval_shape(lambda: jaxkv.init(CONFIG, policies.LeastRecentlyUsed(200)))
    assert_in_place(operation, cache, SLOTS, SLOTS)


def test_a_cache_in_any_argument_may_be_donated():
    assert_in_place(lambda seqs, cache: jitted.free(cache, seqs), SLOTS, CACHE, donate_argnums=(1,))


def test_a_cache_that_is_not_donated_is_not_in_place():
    with pytest.raises(AssertionError, match="donated"):
        assert_in_place(jaxkv.free, CACHE, SLOTS, donate_argnums=())


def test_a_pool_that_is_kept_beside_its_update_is_a_copy():
    def keeps_both(cache, seqs, k):
        after, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
        after = jaxkv.append(after, 0, batch, k, k)
        return after, jaxkv.gather(cache, 0, seqs)[0].sum()

    def copies(cache):
        k = cache.pool.k.at[0, 0].set(0.0)
        return replace(cache, pool=replace(cache.pool, k=k)), jnp.sum(cache.pool.k * k)

    for fn, arguments in ((keeps_both, (SLOTS, K)), (copies, ())):
        with pytest.raises(AssertionError, match=r"copies a whole pool|temporary memory"):
            assert_in_place(fn, CACHE, *arguments)


def test_a_layer_sliced_out_is_a_copy():
    def slices(cache, layer):
        k = jax.lax.dynamic_index_in_dim(cache.pool.k, layer, keepdims=False)
        order = jnp.argsort(k[:, 0, 0, 0])
        return cache, jax.lax.sort((k + k[order], k), num_keys=1)[1]

    with pytest.raises(AssertionError, match="temporary memory"):
        assert_in_place(slices, CACHE, jax.ShapeDtypeStruct((), jnp.int32))


def test_without_a_cache_there_is_nothing_to_check():
    with pytest.raises(ValueError, match="KVCache"):
        assert_in_place(lambda x: x, jnp.zeros(3))
