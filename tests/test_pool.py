"""Writing and reading K and V: append, gather, and the views of a contiguous cache."""

import inspect
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheConfig, Status
from tests import jitted
from tests.caches import ONE_SEQUENCE, PAGE_OF_ONE, SMALL, filled, ints, normal, poisoned_init, tokens
from tests.twin import Twin

DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("traced", [True, False], ids=["traced layer", "int layer"])
def test_what_is_appended_is_gathered_bit_for_bit(dtype, traced):
    config = replace(SMALL, dtype=dtype, num_layers=3)
    cache, batch = jitted.allocate(poisoned_init(config), ints(2, 0), ints(7, 3), total_tokens=12)
    k, v = tokens(config, 12)
    append = jax.jit(jaxkv.append, static_argnums=() if traced else 1, donate_argnums=0)
    gather = jax.jit(jaxkv.gather, static_argnums=() if traced else 1)
    cache = append(cache, 1, batch, k, v)
    got_k, got_v, lengths = gather(cache, 1, ints(0, 1, 2))
    assert lengths.tolist() == [3, 0, 7]
    for got, want in ((got_k, k), (got_v, v)):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got[2, :7], want[:7])
        np.testing.assert_array_equal(got[0, :3], want[7:10])
        assert not np.asarray(got[0, 3:]).any()
        assert not np.asarray(got[1]).any()


def test_append_touches_one_layer_and_only_the_places_of_its_batch():
    cache, _ = filled(SMALL, (6, 5))
    cache, batch = jitted.allocate(cache, ints(1, -1, 9, 0), ints(2, 1, 2, 1), total_tokens=8)
    before = jax.device_get(cache.pool)
    k, v = tokens(SMALL, 8, seed=5)
    after = jitted.append(cache, 1, batch, k, v).pool
    places = {(int(page), int(offset)): row for row, (page, offset) in enumerate(
        zip(batch.page_ids[0], batch.offsets[0], strict=True)) if page < SMALL.num_pages}  # fmt: skip
    assert sorted(places.values()) == [0, 1, 5]
    for old, new, values in ((before.k, after.k, k), (before.v, after.v, v)):
        want = old.copy()
        for (page, offset), row in places.items():
            want[1, page, :, offset] = values[row]
        np.testing.assert_array_equal(new, want)


def test_wider_values_are_rounded_to_the_pools_dtype():
    config = replace(SMALL, dtype="bfloat16")
    cache, batch = jitted.allocate(jaxkv.init(config), ints(0), ints(1))
    k, v = normal(1, 2, 4, seed=1), normal(1, 2, 4, seed=2)
    cache = jitted.append(cache, 0, batch, k, v)
    got, _, _ = jitted.gather(cache, 0, ints(0))
    np.testing.assert_array_equal(got[0, :1], k.astype("bfloat16"))


def test_a_refused_sequence_is_not_written():
    twin = Twin(ONE_SEQUENCE)
    twin.extend([0], [8])
    before = jax.device_get(twin.cache.pool)
    assert twin.extend([0, 0, 1], [5, 1, 1]) == [
        Status.SEQUENCE_TOO_LONG,
        Status.INVALID_SEQ,
        Status.INVALID_SEQ,
    ]
    chex.assert_trees_all_equal(jax.device_get(twin.cache.pool), before)


def test_gather_takes_slots_in_any_order_and_again():
    cache, _ = filled(SMALL, (6, 5, 1))
    k, v, lengths = jitted.gather(cache, 0, ints(2, 0, 2))
    assert lengths.tolist() == [1, 6, 1]
    for dense in (k, v):
        np.testing.assert_array_equal(dense[0], dense[2])


def test_gather_of_nobody_is_zero():
    cache, _ = filled(SMALL, (6, 5))
    k, v, lengths = jitted.gather(cache, 0, ints(-1, 3, 4, 2**31 - 1, -(2**31)))
    assert lengths.tolist() == [0] * 5
    assert not np.asarray(k).any()
    assert not np.asarray(v).any()


@pytest.mark.parametrize("config", [SMALL, PAGE_OF_ONE, ONE_SEQUENCE], ids=["4", "1", "one"])
def test_gather_is_as_wide_as_a_row(config):
    k, v, _ = jitted.gather(jaxkv.init(config), 0, ints(0))
    assert k.shape == v.shape == (1, config.max_tokens_per_seq, 2, 4)


# The contiguous case ----------------------------------------------------------------------------

CONTIGUOUS = CacheConfig.contiguous(
    num_layers=2, num_kv_heads=2, head_dim=4, max_seqs=3, max_tokens=10, dtype="float32"
)


def test_keys_and_values_are_dense_views_by_slot():
    cache, written = filled(CONTIGUOUS, (4, 0, 6))
    for layer, (k, v) in enumerate(written):
        for got, want in ((jaxkv.keys(cache, layer), k), (jaxkv.values(cache, layer), v)):
            assert got.shape == (3, 10, 2, 4)
            np.testing.assert_array_equal(got[0, :4], want[:4])
            np.testing.assert_array_equal(got[2, :6], want[4:])
            assert not np.asarray(got[0, 4:]).any()
            assert not np.asarray(got[1]).any()


def test_a_contiguous_cache_takes_every_operation():
    twin = Twin(CONTIGUOUS)
    assert twin.extend([1, 2], [7, 1]) == [Status.OK, Status.OK]
    assert twin.extend([1], [4]) == [Status.SEQUENCE_TOO_LONG]
    assert twin.extend([1], [3]) == [Status.OK]
    twin.truncate([1], [5])
    assert twin.fork([1], [0]) == [Status.OK]
    assert twin.extend([0, 1], [1, 1]) == [Status.OK, Status.OUT_OF_PAGES]  # its parent's copy
    twin.free([2])
    twin.compact()


@pytest.mark.parametrize("view", [jaxkv.keys, jaxkv.values])
def test_a_paged_cache_has_no_dense_view(view):
    with pytest.raises(ValueError, match="contiguous"):
        view(jaxkv.init(SMALL), 0)


# Static mistakes, as a user meets them: without the tests' type checker ---------------------------


def mistakes(cache, batch):
    append, gather = inspect.unwrap(jaxkv.append), inspect.unwrap(jaxkv.gather)
    good = jnp.zeros((3, 2, 4))
    return {
        "k .*head_dim=4.*5": lambda: append(cache, 0, batch, jnp.zeros((3, 2, 5)), good),
        "v .*kv_heads=2.*3": lambda: append(cache, 0, batch, good, jnp.zeros((3, 3, 4))),
        "k .*tokens=3.*4": lambda: append(cache, 0, batch, jnp.zeros((4, 2, 4)), good),
        "v .*tokens": lambda: append(cache, 0, batch, good, jnp.zeros((3, 8))),
        "k .*int32": lambda: append(cache, 0, batch, good.astype(jnp.int32), good),
        "layer=2": lambda: append(cache, 2, batch, good, good),
        "layer=-1": lambda: gather(cache, -1, ints(0)),
        "layer must be an integer scalar, not 0.0": lambda: gather(cache, 0.0, ints(0)),
        "seqs .*float32": lambda: gather(cache, 0, jnp.zeros(2)),
        r"seqs .*\[1, 1\]": lambda: gather(cache, 0, ints([0])),
    }


@pytest.mark.parametrize("message", mistakes(None, None))
def test_a_wrong_shape_dtype_or_layer_is_a_value_error_that_names_it(message, no_shape_checks):
    cache, batch = jitted.allocate(jaxkv.init(SMALL), ints(0, 1, 2), ints(1, 1, 1))
    with pytest.raises(ValueError, match=message):
        mistakes(cache, batch)[message]()


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_append_and_gather(self):
        cache, batch = jitted.allocate(jaxkv.init(SMALL), ints(1), ints(5), total_tokens=5)
        k, v = tokens(SMALL, 5)
        cache = self.variant(jaxkv.append)(cache, jnp.int32(1), batch, k, v)
        got_k, got_v, lengths = self.variant(jaxkv.gather)(cache, jnp.int32(1), ints(1))
        chex.assert_trees_all_equal((got_k[0, :5], got_v[0, :5], lengths), (k, v, ints(5)))
