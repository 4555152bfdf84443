"""A batch serves the page table that it was made for, and a layer that exists; anything else does no harm."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.policies import HeavyHitter, SlidingWindow
from pallas_kernels import use_backend
from tests import jitted
from tests.caches import SMALL, filled, ints, normal, tokens

CONFIG = replace(SMALL, head_dim=16)
ROPE = jaxkv.Rope.of(head_dim=CONFIG.head_dim, theta=10000.0)
Q = normal(3, 4, CONFIG.head_dim)


def filled_with_a_batch():
    """Sequences of 5, 9 and 2 tokens, one more of each in every layer, and the batch of these."""
    cache, _ = filled(CONFIG, [5, 9, 2])
    cache, batch = jitted.allocate(cache, ints(0, 1, 2), ints(1, 1, 1))
    for layer in range(CONFIG.num_layers):
        cache = jitted.append(cache, layer, batch, *tokens(CONFIG, 3, seed=3))
    return cache, batch


def evicted(policy, cache):
    cache = replace(cache, policy=jaxkv.init(cache.config, policy).policy)
    cache, dropped = jitted.evict(cache, ints(1))
    assert dropped[0] > 0
    return cache


CHANGES = {
    "free": lambda cache: jitted.free(cache, ints(2)),
    "truncate": lambda cache: jitted.truncate(cache, ints(1), ints(9))[0],
    "allocate": lambda cache: jitted.allocate(cache, ints(0), ints(1))[0],
    "fork": lambda cache: jitted.fork(cache, ints(1), ints(3))[0],
    "reorder": lambda cache: jitted.reorder(cache, ints(0, 1), ints(1, 0))[0],
    "compact": lambda cache: jitted.compact(cache)[0],
    "shift_positions": lambda cache: jax.jit(partial(jaxkv.shift_positions, rope=ROPE))(
        cache, ints(1), ints(3)
    )[0],
    "a window's eviction": partial(evicted, SlidingWindow(window=3, sinks=0)),
    "an eviction of tokens": partial(evicted, HeavyHitter(budget=6, recent=3)),
}


def assert_serves_nothing(cache, layer, batch):
    k, v = tokens(CONFIG, 3, seed=5)
    after = jitted.append(cache, layer, batch, k, v)
    jax.tree.map(np.testing.assert_array_equal, after, cache)
    out, lse = jitted.attend(cache, layer, batch, Q, return_lse=True)
    for result in out, lse, jitted.attention_mass(cache, layer, batch, Q, lse):
        assert np.isnan(result).all()


@pytest.mark.parametrize("change", CHANGES)
def test_a_batch_is_stale_once_the_page_table_has_changed(change):
    cache, batch = filled_with_a_batch()
    assert not np.isnan(jitted.attend(cache, 0, batch, Q)).any()
    assert_serves_nothing(CHANGES[change](cache), 0, batch)


def test_a_stale_batch_leaves_the_next_owner_of_its_page_alone():
    cache, old = jitted.allocate(jaxkv.init(CONFIG), ints(0), ints(1))
    cache = jitted.free(cache, ints(0))
    cache, new = jitted.allocate(cache, ints(1), ints(1))
    assert old.page_ids[0] == new.page_ids[0]
    k, v = tokens(CONFIG, 1)
    cache = jitted.append(cache, 0, new, k, v)
    cache = jitted.append(cache, 0, old, k + 1, v + 1)
    np.testing.assert_array_equal(jitted.gather(cache, 0, ints(1))[0][0, 0], k[0])


def test_calls_that_change_nothing_leave_a_batch_as_good_as_it_was():
    cache, batch = filled_with_a_batch()
    after = jitted.free(jitted.truncate(cache, ints(0, 1), ints(40, 10))[0], ints(-1, 3))
    after, status = jitted.fork(after, ints(0), ints(1))
    assert status[0] == jaxkv.Status.OCCUPIED
    after, refused = jitted.allocate(after, ints(0, 9), ints(0, 1))
    np.testing.assert_array_equal(after.table.fingerprint, cache.table.fingerprint)
    expected = jitted.attend(cache, 0, batch, Q)
    np.testing.assert_array_equal(jitted.attend(after, 0, batch, Q), expected)
    assert refused.status.tolist() == [jaxkv.Status.OK, jaxkv.Status.INVALID_SEQ]


def test_append_leaves_the_fingerprint_as_it_is():
    cache, batch = filled_with_a_batch()
    after = jitted.append(cache, 0, batch, *tokens(CONFIG, 3, seed=4))
    np.testing.assert_array_equal(after.table.fingerprint, cache.table.fingerprint)


@pytest.mark.parametrize(
    "one, other",
    [
        ((ints(0), ints(1)), (ints(1), ints(1))),
        ((ints(0), ints(1)), (ints(0), ints(2))),
        ((ints(0, 1), ints(1, 1)), (ints(1, 0), ints(1, 1))),
    ],
)
def test_two_branches_of_one_cache_do_not_take_each_others_batches(one, other):
    cache, _ = filled(CONFIG, [4, 4])
    first, first_batch = jitted.allocate(cache, *one, total_tokens=3)
    second, second_batch = jitted.allocate(cache, *other, total_tokens=3)
    assert_serves_nothing(first, 1, second_batch)
    assert_serves_nothing(second, 1, first_batch)


@pytest.mark.parametrize("layer", [-1, CONFIG.num_layers, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_a_traced_layer_that_does_not_exist_is_neither_written_nor_read(layer, backend):
    cache, batch = filled_with_a_batch()
    with use_backend(backend, interpret=backend != "xla"):
        assert_serves_nothing(cache, jnp.int32(layer), batch)
    k, v, lengths = jitted.gather(cache, jnp.int32(layer), ints(0))
    assert np.isnan(k).all() and np.isnan(v).all() and lengths[0] == 6


@pytest.mark.parametrize("layer", [-1, CONFIG.num_layers])
def test_a_python_int_that_is_no_layer_is_an_error(layer):
    cache, batch = filled_with_a_batch()
    for call in (
        lambda: jaxkv.append(cache, layer, batch, *tokens(CONFIG, 3)),
        lambda: jaxkv.attend(cache, layer, batch, Q),
        lambda: jaxkv.gather(cache, layer, ints(0)),
    ):
        with pytest.raises(ValueError, match=rf"layer={layer} must be from 0 to 1"):
            call()


def test_a_policy_notes_nothing_of_a_stale_batch():
    cache, batch = filled_with_a_batch()
    cache = replace(cache, policy=jaxkv.init(CONFIG, HeavyHitter(budget=6, recent=3)).policy)
    mass = jnp.ones((2, 3, 2, CONFIG.max_tokens_per_seq))
    assert np.any(jitted.observe(cache, batch, mass).policy.values["mass"])
    assert not np.any(jitted.observe(jitted.free(cache, ints(2)), batch, mass).policy.values["mass"])


def test_to_observe_a_step_leaves_its_batch_as_it_is():
    cache, batch = filled_with_a_batch()
    cache = replace(cache, policy=jaxkv.init(CONFIG, HeavyHitter(budget=6, recent=3)).policy)
    after = jitted.observe(cache, batch, jnp.ones((2, 3, 2, CONFIG.max_tokens_per_seq)))
    np.testing.assert_array_equal(after.table.fingerprint, batch.fingerprint)


def test_stale_entries_are_told_apart_under_vmap():
    """One cache of two goes on, the other's table changes; each has the same batch as before."""
    cache, batch = filled_with_a_batch()
    both = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
    both = jax.vmap(jaxkv.free)(both, jnp.array([[-1], [2]], jnp.int32))
    out = jax.jit(jax.vmap(lambda cache: jaxkv.attend(cache, 0, batch, Q)))(both)
    assert not np.isnan(out[0]).any() and np.isnan(out[1]).all()
