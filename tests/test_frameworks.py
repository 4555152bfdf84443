"""Every framework needs nothing but the pytree: one decoder, held by each in its own way.

All of them decode the same tokens with the same weights, and must give what plain functions give.
"""

from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import CacheConfig
from jaxkv.testing import assert_caches_equivalent
from tests.caches import ints, normal

LAYERS, WIDTH, STEPS = 3, 16, 5
CONFIG = CacheConfig(
    num_layers=LAYERS,
    num_kv_heads=2,
    head_dim=4,
    num_pages=8,
    page_size=2,
    max_seqs=3,
    max_pages_per_seq=4,
    dtype="float32",
)
WEIGHTS = 0.3 * normal(LAYERS, WIDTH, 4 * 4 + 2 * 2 * 4)  # q, k and v of every layer in one matrix
SEQS = ints(2, 0)
INPUTS = normal(STEPS, len(SEQS), WIDTH, seed=1)


def block(weights, cache, layer, batch, x):
    """One layer: attention with a residual."""
    q, k, v = jnp.split(x @ weights, [16, 24], axis=-1)
    heads = lambda y: y.reshape(len(y), -1, CONFIG.head_dim)  # noqa: E731
    cache = jaxkv.append(cache, layer, batch, heads(k), heads(v))
    return cache, x + jaxkv.attend(cache, layer, batch, heads(q)).reshape(x.shape)


def begin(cache, seqs):
    return jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))


@partial(jax.jit, donate_argnames="cache")
def plain_step(weights, cache, seqs, x):
    cache, batch = begin(cache, seqs)
    for layer in range(LAYERS):
        cache, x = block(weights[layer], cache, layer, batch, x)
    return cache, x


@pytest.fixture(scope="module")
def expected():
    cache, outputs = jaxkv.init(CONFIG), []
    for x in INPUTS:
        cache, y = plain_step(WEIGHTS, cache, SEQS, x)
        outputs.append(y)
    return cache, jnp.stack(outputs)


def check(cache, outputs, expected):
    np.testing.assert_allclose(jnp.stack(outputs), expected[1], rtol=1e-5, atol=1e-5)
    jaxkv.check_invariants(cache)
    np.testing.assert_array_equal(cache.table.lengths, expected[0].table.lengths)


def test_scan_over_layers(expected):
    @partial(jax.jit, donate_argnames="cache")
    def step(weights, cache, seqs, x):
        cache, batch = begin(cache, seqs)

        def one_layer(carry, xs):
            layer, weights = xs
            return block(weights, carry[0], layer, batch, carry[1]), None

        layers = jnp.arange(LAYERS, dtype=jnp.int32)
        return jax.lax.scan(one_layer, (cache, x), (layers, weights))[0]

    cache, outputs = jaxkv.init(CONFIG), []
    for x in INPUTS:
        cache, y = step(WEIGHTS, cache, SEQS, x)
        outputs.append(y)
    check(cache, outputs, expected)


def test_scan_over_steps(expected):
    def step(cache, x):
        cache, batch = begin(cache, SEQS)
        for layer in range(LAYERS):
            cache, x = block(WEIGHTS[layer], cache, layer, batch, x)
        return cache, x

    run = jax.jit(lambda cache, xs: jax.lax.scan(step, cache, xs), donate_argnums=0)
    cache, outputs = run(jaxkv.init(CONFIG), INPUTS)
    check(cache, outputs, expected)
    assert_caches_equivalent(cache, expected[0])


def test_linen_variable(expected):
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, seqs, x):
            state = self.variable("cache", "kv", jaxkv.init, CONFIG)
            weights = self.param("weights", lambda _: WEIGHTS)
            cache, batch = begin(state.value, seqs)
            for layer in range(LAYERS):
                cache, x = block(weights[layer], cache, layer, batch, x)
            if not self.is_initializing():
                state.value = cache
            return x

    model = Decoder()
    variables = jax.jit(model.init)(jax.random.key(0), SEQS, INPUTS[0])
    params, state = variables["params"], {"cache": variables["cache"]}

    @partial(jax.jit, donate_argnums=1)
    def step(params, state, x):
        return model.apply({"params": params, **state}, SEQS, x, mutable=["cache"])

    outputs = []
    for x in INPUTS:
        y, state = step(params, state, x)
        outputs.append(y)
    check(state["cache"]["kv"], outputs, expected)


def test_nnx_cache_variable(expected):
    class Decoder(nnx.Module):
        def __init__(self):
            self.weights = nnx.Param(WEIGHTS)
            self.kv = nnx.Cache(jaxkv.init(CONFIG))

        def __call__(self, seqs, x):
            weights = self.weights[...]
            cache, batch = begin(self.kv.get_value(), seqs)
            for layer in range(LAYERS):
                cache, x = block(weights[layer], cache, layer, batch, x)
            self.kv.set_value(cache)
            return x

    step = nnx.jit(lambda model, x: model(SEQS, x))
    model = Decoder()
    outputs = [step(model, x) for x in INPUTS]
    check(model.kv.get_value(), outputs, expected)


def test_nnx_split_and_donated(expected):
    """The functional way: the module's state, cache and all, goes through a donated `jax.jit`."""

    class Decoder(nnx.Module):
        def __init__(self):
            self.kv = nnx.Cache(jaxkv.init(CONFIG))

        def __call__(self, seqs, x):
            cache, batch = begin(self.kv.get_value(), seqs)
            for layer in range(LAYERS):
                cache, x = block(WEIGHTS[layer], cache, layer, batch, x)
            self.kv.set_value(cache)
            return x

    graph, state = nnx.split(Decoder())

    @partial(jax.jit, donate_argnums=0)
    def step(state, x):
        model = nnx.merge(graph, state)
        y = model(SEQS, x)
        return nnx.state(model), y

    outputs = []
    for x in INPUTS:
        state, y = step(state, x)
        outputs.append(y)
    check(nnx.merge(graph, state).kv.get_value(), outputs, expected)


def test_equinox_field(expected):
    class Decoder(eqx.Module):
        weights: jax.Array
        kv: jaxkv.KVCache

        def __call__(self, seqs, x):
            cache, batch = begin(self.kv, seqs)
            for layer in range(LAYERS):
                cache, x = block(self.weights[layer], cache, layer, batch, x)
            return eqx.tree_at(lambda model: model.kv, self, cache), x

    model, outputs = Decoder(WEIGHTS, jaxkv.init(CONFIG)), []
    step = eqx.filter_jit(lambda model, x: model(SEQS, x), donate="all-except-first")
    for x in INPUTS:
        model, y = step(model, jnp.copy(x))
        outputs.append(y)
    check(model.kv, outputs, expected)


def test_equinox_filters_see_arrays_and_one_static_config():
    cache = jaxkv.init(CONFIG)
    arrays, rest = eqx.partition(cache, eqx.is_array)
    assert not jax.tree.leaves(rest)
    assert eqx.tree_equal(eqx.combine(arrays, rest), cache)


def test_a_cache_in_a_dict_or_a_tuple_of_state(expected):
    """As Haiku-style and hand-written trees hold it."""

    @partial(jax.jit, donate_argnums=0)
    def step(state, x):
        cache, y = plain_step.__wrapped__(state["weights"], state["layers"][0], SEQS, x)
        return {"weights": state["weights"], "layers": (cache,)}, y

    state, outputs = {"weights": jnp.copy(WEIGHTS), "layers": (jaxkv.init(CONFIG),)}, []
    for x in INPUTS:
        state, y = step(state, x)
        outputs.append(y)
    check(state["layers"][0], outputs, expected)


def test_a_cache_survives_flattening_to_numpy_and_back():
    """What checkpoint libraries do."""
    cache, _ = plain_step(WEIGHTS, jaxkv.init(CONFIG), SEQS, INPUTS[0])
    leaves, structure = jax.tree.flatten(cache)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    assert_caches_equivalent(cache, restored)
    jaxkv.check_invariants(restored)
