"""Token lists become the arrays that a step takes."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.packing import chunks
from jaxkv.sizing import pool_sizes
from tests import jitted
from tests.caches import SMALL


def test_packed_lists_are_what_allocate_takes():
    tokens, num_tokens = jaxkv.pack([[5, 6, 7], (), np.array([8], np.int64)], total_tokens=6)
    assert (tokens.dtype, num_tokens.dtype) == (jnp.int32, jnp.int32)
    assert (tokens.tolist(), num_tokens.tolist()) == ([5, 6, 7, 8, 0, 0], [3, 0, 1])
    seqs = jnp.arange(3, dtype=jnp.int32)
    _, batch = jitted.allocate(jaxkv.init(SMALL), seqs, num_tokens, total_tokens=6)
    assert tokens[batch.last_rows].tolist() == [7, 7, 8]


def test_the_axis_is_as_long_as_the_tokens_unless_it_is_said():
    assert jaxkv.pack([[1], [2, 3]])[0].shape == (3,)
    assert jaxkv.pack([[1], [2, 3]], total_tokens=np.int64(8))[0].shape == (8,)
    assert jaxkv.pack([[], []], total_tokens=2)[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("lists", "total", "message"),
    [
        ([[1, 2], [3]], 2, "3 tokens in all, more than total_tokens=2"),
        ([], 4, "token_lists is empty"),
        ([[], []], None, "has no tokens"),
        ([[1]], 0, "total_tokens=0"),
        ([[1], [2, -1]], 4, r"token_lists\[1\] has -1"),
        ([[2**31]], 4, r"token_lists\[0\] has 2147483648"),
        ([[1.0]], 4, r"token_lists\[0\].*float64"),
        ([[True]], 4, r"token_lists\[0\].*bool"),
        ([[[1]]], 4, r"token_lists\[0\].*\[1, 1\]"),
        ([1, 2], 4, r"token_lists\[0\] must be a list"),
    ],
)
def test_what_is_no_list_of_token_ids_is_refused_by_entry(lists, total, message):
    with pytest.raises(ValueError, match=message):
        jaxkv.pack(lists, total_tokens=total)


@pytest.mark.parametrize("size", [32, 128])
def test_a_pool_sized_for_prompts_holds_them_until_each_releases_what_is_outside_its_window(size):
    make = partial(
        jaxkv.CacheConfig, num_layers=2, num_kv_heads=1, head_dim=1, layer_windows=(16, None), max_chunk=32
    )
    prompts = [[1] * 100] * 4
    config = make(**pool_sizes(make, [100] * 4, [110] * 4, [110] * 4, 1, None, size))
    cache, seqs = jaxkv.init(config), jnp.arange(4, dtype=jnp.int32)
    for num_tokens, _, _ in chunks(prompts, size, config.max_chunk, whole=False):
        cache, batch = jitted.allocate(cache, seqs, jnp.asarray(num_tokens), total_tokens=size)
        assert batch.status.tolist() == [jaxkv.Status.OK] * 4
        cache, _ = jitted.evict(cache, seqs)  # as `jaxkv.prefill` does
    for _ in range(10):
        cache, batch = jitted.allocate(cache, seqs, jnp.ones_like(seqs))
        assert batch.status.tolist() == [jaxkv.Status.OK] * 4
