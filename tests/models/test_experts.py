"""A mixture of experts against the definition, token by token, in NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkv.models import ModelConfig
from jaxkv.models.experts import Experts
from jaxkv.models.mlp import Mixture

SIZES = Experts(count=6, per_token=2, intermediate_size=10)
KINDS = {
    "normalized": SIZES,
    "not normalized, shared": dataclasses.replace(SIZES, normalized=False, shared_size=8, shared_gate=True),
    "one expert": Experts(count=1, per_token=1, intermediate_size=10),
}


def mixture_of(experts):
    config = ModelConfig(
        vocab_size=8, hidden_size=12, num_layers=1, num_q_heads=1, num_kv_heads=1, head_dim=4,
        intermediate_size=8, max_context=16, experts=experts,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    return Mixture(
        config,
        experts,
        lambda _, *shape, wanted=True: (
            nnx.Param(jnp.asarray(rng.standard_normal(shape, dtype=np.float32))) if wanted else None
        ),
    )


def silu(x):
    return x / (1.0 + np.exp(-x))


def by_definition(mixture, x):
    experts, out = mixture.experts, np.zeros_like(x)
    for token, row in enumerate(x):
        scores = np.exp(mixture.router[...] @ row)
        scores /= scores.sum()
        chosen = np.argsort(-scores)[: experts.per_token]
        total = scores[chosen].sum() if experts.normalized else 1.0
        for one in chosen:
            gate, up = np.split(row @ mixture.gate_up[...][one], 2)
            out[token] += scores[one] / total * ((silu(gate) * up) @ mixture.down[...][one])
        if experts.shared_size:
            gate, up = np.split(mixture.shared_gate_up[...] @ row, 2)
            weight = 1.0 / (1.0 + np.exp(-(mixture.shared_gate[...] @ row)))
            out[token] += weight * (mixture.shared_down[...] @ (silu(gate) * up))
    return out


@pytest.mark.parametrize("experts", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("tokens", [1, 40], ids="tokens={}".format)
def test_few_tokens_and_many_give_the_weighted_sum_of_their_experts(experts, tokens):
    mixture = mixture_of(experts)
    x = np.random.default_rng(tokens).standard_normal((tokens, 12), dtype=np.float32)
    np.testing.assert_allclose(mixture(jnp.asarray(x)), by_definition(mixture, x), rtol=1e-4, atol=1e-5)


def test_tokens_that_all_choose_the_same_experts_are_all_computed():
    mixture = mixture_of(SIZES)
    x = np.tile(np.random.default_rng(0).standard_normal((1, 12), dtype=np.float32), (40, 1))
    np.testing.assert_allclose(mixture(jnp.asarray(x)), by_definition(mixture, x), rtol=1e-4, atol=1e-5)


def test_padding_of_any_value_disturbs_no_token():
    mixture, rng = mixture_of(SIZES), np.random.default_rng(0)
    x = rng.standard_normal((40, 12), dtype=np.float32)
    expected = by_definition(mixture, x)[:9]
    for padding in (0.0, 1e30, np.nan):
        x[9:] = padding
        np.testing.assert_allclose(mixture(jnp.asarray(x))[:9], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_token": 7}, "experts' per_token must be an integer from 1 to 6, not 7"),
        ({"count": 0}, "experts' count must be an integer from 1 to 65536, not 0"),
        ({"shared_size": 0}, "experts' shared_size must be an integer from 1 to 1048576, not 0"),
    ],
)
def test_a_bad_size_is_named(change, message):
    with pytest.raises(ValueError) as raised:
        dataclasses.replace(SIZES, **change)
    assert str(raised.value) == message
