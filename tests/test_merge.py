"""Merged parts are attention over all of their keys."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from pallas_kernels import reference
from tests import jitted
from tests.caches import SMALL, filled, ints, normal

merge = jax.jit(jaxkv.merge_attention)
RANDOM = np.random.default_rng(0)
Q, K, V = (RANDOM.normal(size=shape) for shape in ((3, 4, 8), (9, 2, 8), (9, 2, 8)))


def attention(q, k, v, scale=8**-0.5):
    """float64, every key seen by every query; grouped heads."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("thd,khd->thk", q, k) * scale
    weights = np.exp(scores)
    total = weights.sum(-1)
    return np.einsum("thk,khd->thd", weights / total[..., None], v), np.log(total)


def parts(dtype="float32", bounds=(0, 2, 7, 9)):
    pairs = [attention(Q, K[a:b], V[a:b]) for a, b in pairwise(bounds)]
    outs, lses = zip(*pairs, strict=True)
    return [jnp.asarray(out, dtype) for out in outs], [jnp.asarray(lse, "float32") for lse in lses]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2.0**-7)])
def test_merged_parts_are_attention_over_all_keys(dtype, tolerance):
    want, want_lse = attention(Q, K, V)
    out, lse = merge(*parts(dtype))
    assert (out.dtype, lse.dtype) == (dtype, "float32")
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


def test_lists_and_stacked_arrays_say_the_same():
    outs, lses = parts()
    for one, other in zip(merge(outs, lses), merge(jnp.stack(outs), jnp.stack(lses)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        pairs = [attention(Q, K[a:b], V[a:b]) for a, b in ((0, 4), (4, 9))]
        out, lse = jaxkv.merge_attention(*map(jnp.asarray, map(np.stack, zip(*pairs, strict=True))))
        for got, want in zip((out, lse), attention(Q, K, V), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-15)


def test_an_empty_part_changes_nothing_whatever_it_holds():
    outs, lses = parts()
    empty = jnp.full_like(lses[0], -jnp.inf)
    with_empty = merge([outs[0], jnp.full_like(outs[0], jnp.nan), *outs[1:]], [lses[0], empty, *lses[1:]])
    for one, other in zip(with_empty, merge(outs, lses), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_empty_parts_only_give_zeros_and_minus_infinity():
    out, lse = merge(jnp.full((2, 3, 4, 8), jnp.nan), jnp.full((2, 3, 4), -jnp.inf))
    assert not out.any()
    assert np.isneginf(lse).all()


def test_scores_far_from_zero_neither_overflow_nor_vanish():
    outs, lses = parts()
    want, want_lse = merge(outs, lses)
    for by in (1e4, -1e4):
        out, lse = merge(outs, [lse + by for lse in lses])
        np.testing.assert_allclose(out, want, rtol=1e-2, atol=1e-3)  # float32 keeps 1e-3 of such a score
        np.testing.assert_allclose(lse, want_lse + by, rtol=1e-6)


def test_a_part_that_could_not_be_computed_is_not_hidden():
    outs, lses = parts()
    out, lse = merge(outs, [lses[0], jnp.full_like(lses[1], jnp.nan), lses[2]])
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def test_parts_of_a_cache_merge_with_their_log_sum_exp():
    """What `attend` returns goes in as it is: one question to two sequences, as to a prefix kept apart."""
    cache, _ = filled(SMALL, (5, 3))
    _, batch = jitted.allocate(cache, ints(0, 1), ints(0, 0), total_tokens=2)
    q = jnp.tile(normal(1, 4, 4), (2, 1, 1))
    batch = replace(batch, num_tokens=ints(1, 1), query_starts=ints(0, 1, 2))
    out, lse = jitted.attend(cache, 0, batch, q, return_lse=True)
    merged, total = merge(out[:, None], lse[:, None])
    pages = [jitted.gather(cache, 0, ints(slot)) for slot in (0, 1)]
    k, v = (
        np.concatenate(
            [np.asarray(page[i][0, :n], np.float64) for page, n in zip(pages, (5, 3), strict=True)]
        )
        for i in (0, 1)
    )
    want, want_lse = reference.attention(np.asarray(q[:1], np.float64), k, v)
    np.testing.assert_allclose(merged, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, want_lse, rtol=1e-5)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "outs must be parts of one shape"),
        ([np.zeros((1, 1, 2)), np.zeros((2, 1, 2))], np.zeros((2, 1, 1)), r"\[1, 1, 2\].*\[2, 1, 2\]"),
        (np.zeros((2, 3, 1)), np.zeros((2, 3)), r"outs must be \[parts, tokens, heads, head_dim\]"),
        (np.zeros((2, 3, 1, 4)), np.zeros((2, 1, 3)), r"lses \[2, 1, 3\].*\[2, 3, 1\]"),
        (np.zeros((2, 3, 1, 4), int), np.zeros((2, 3, 1)), "outs must be floating point"),
    ],
)
def test_parts_that_do_not_fit_are_refused(outs, lses, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        jaxkv.merge_attention(outs, lses)
