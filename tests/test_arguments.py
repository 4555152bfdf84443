"""Numbers of NumPy as arguments: they are Python's own from there on, and bools are none."""

from dataclasses import astuple

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheConfig, sizing
from jaxkv.policies import heavy_hitter, least_recently_used, prompt_compress, semantic_merge, sliding_window
from jaxkv.rope import Rope
from pallas_kernels.checks import check_options
from tests.caches import SMALL, ints

SIZES = dict(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, page_size=2, max_seqs=3)
INTEGERS = pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8, np.array], ids=str)
BOOLS = pytest.mark.parametrize("value", [True, np.True_, np.array(True)], ids=repr)


def assert_same(numpys, pythons):
    """Equal, of equal hash and text, and no number of it is NumPy's."""
    assert (numpys, hash(numpys), repr(numpys)) == (pythons, hash(pythons), repr(pythons))
    assert [type(value) for value in astuple(numpys)] == [type(value) for value in astuple(pythons)]


@INTEGERS
def test_a_config_of_numpy_numbers_is_that_of_python_numbers(integer):
    sizes = {name: integer(value) for name, value in SIZES.items()}
    threshold = np.float32(0.5)
    assert_same(
        CacheConfig(**sizes, compaction_threshold=threshold), CacheConfig(**SIZES, compaction_threshold=0.5)
    )
    sizes = dict(num_layers=1, num_kv_heads=1, head_dim=8)
    ours = sizing.for_context_length(integer(32), **sizes)
    assert_same(ours, sizing.for_context_length(32, **sizes))
    assert type(ours.max_context_length(integer(2))) is int


@INTEGERS
def test_a_policy_of_numpy_numbers_is_that_of_python_numbers(integer):
    eight, two, three = integer(8), integer(2), integer(3)
    for numpys, pythons in [
        (sliding_window.SlidingWindow(eight, two), sliding_window.SlidingWindow(8, 2)),
        (heavy_hitter.HeavyHitter(eight, two), heavy_hitter.HeavyHitter(8, 2)),
        (semantic_merge.SemanticMerge(eight, two), semantic_merge.SemanticMerge(8, 2)),
        (prompt_compress.PromptCompress(eight, two, three), prompt_compress.PromptCompress(8, 2, 3)),
        (
            least_recently_used.LeastRecentlyUsed(eight, np.float32(0.5)),
            least_recently_used.LeastRecentlyUsed(8, 0.5),
        ),
    ]:
        assert_same(numpys, pythons)


def test_frequencies_of_numpy_are_those_of_python():
    assert_same(Rope((np.float32(1.0), np.float64(0.5))), Rope((1.0, 0.5)))


@INTEGERS
def test_options_of_attention_may_be_numpys(integer):
    options = check_options(np.float32(0.5), integer(7), integer(2), np.float64(3))
    assert tuple(options) == (0.5, 7, 2, 3.0)
    assert [type(value) for value in options] == [float, int, int, float]


@pytest.mark.usefixtures("no_shape_checks")
def test_a_step_takes_numpy_numbers():
    cache, batch = jaxkv.allocate(jaxkv.init(SMALL), ints(0), ints(2), total_tokens=np.int64(2))
    k = jnp.ones((2, 2, 4))
    cache = jaxkv.append(cache, np.int64(0), batch, k, k)
    options = dict(scale=np.float32(0.5), window=np.int64(2), sink_tokens=np.uint8(1), softcap=np.float32(9))
    out = jaxkv.attend(cache, np.int32(0), batch, jnp.ones((2, 2, 4)), **options)
    np.testing.assert_allclose(out, jnp.ones_like(out), rtol=1e-6)


@BOOLS
@pytest.mark.usefixtures("no_shape_checks")
def test_bools_are_no_numbers(value):
    for call in (
        lambda: CacheConfig(**SIZES | {"page_size": value}),
        lambda: CacheConfig(**SIZES, compaction_threshold=value),
        lambda: sliding_window.SlidingWindow(value),
        lambda: least_recently_used.LeastRecentlyUsed(8, value),
        lambda: check_options(value, None, 0, None),
        lambda: check_options(None, value, 0, None),
        lambda: check_options(None, 4, value, None),
        lambda: check_options(None, None, 0, value),
        lambda: Rope((value,)),
        lambda: jaxkv.allocate(jaxkv.init(SMALL), ints(0), ints(2), total_tokens=value),
    ):
        with pytest.raises(ValueError, match=r"must (be|lie)"):
            call()
