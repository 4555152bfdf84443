"""What generation checks of a model: the shape of what it returns, the layers it writes, its vocabulary."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.prefill import prefill, prefill_checked

VOCAB, PROMPTS = 8, [[3, 4, 5], [6]]


class Counts:
    """After token t comes t + 1. It writes zeros for K and V to so many layers."""

    def __init__(self, layers=2, scanned=False, rows=lambda rows: rows, results=lambda *results: results):
        self.layers, self.scanned, self.rows, self.results = layers, scanned, rows, results

    def __call__(self, tokens, cache, batch, *, rows=None):
        zeros = jnp.zeros((tokens.shape[0], 1, 8))

        def write(cache, layer):
            return jaxkv.append(cache, layer, batch, zeros, zeros), None

        if self.scanned:
            cache, _ = jax.lax.scan(write, cache, jnp.arange(self.layers, dtype=jnp.int32))
        else:
            for layer in range(self.layers):
                cache, _ = write(cache, layer)
        rows = self.rows(rows)
        last = tokens if rows is None else tokens[rows]
        return self.results(jax.nn.one_hot((last + 1) % VOCAB, VOCAB), cache)

    def cache_config(self, **sizes):
        kinds = dict(num_layers=self.layers, num_kv_heads=1, head_dim=8, dtype="float32")
        return jaxkv.CacheConfig(**{**kinds, **sizes})


jax.tree_util.register_static(Counts)
KEYS = jax.random.key(3), jax.random.PRNGKey(3)
# Room for the longest text of both prompts, so that none takes turns.
CONFIG = Counts().cache_config(num_pages=96, page_size=4, max_seqs=4, max_pages_per_seq=8)


@pytest.mark.parametrize("prefill_chunk", [256, 2])
def test_a_model_that_ignores_rows_is_refused_with_both_shapes(prefill_chunk):
    """With a chunk of two tokens for two prompts its logits would have the right shape by chance."""
    model = Counts(rows=lambda rows: None)
    with pytest.raises(
        ValueError, match=r"float logits \[[23], vocab\] for tokens \[[24]\] .* float32\[[24], 8\]"
    ):
        jaxkv.generate(model, PROMPTS, CONFIG, prefill_chunk=prefill_chunk)
    with pytest.raises(ValueError, match="rows"):
        ints = jnp.arange(2, dtype=jnp.int32)
        jax.eval_shape(prefill, model, jaxkv.init(CONFIG), ints, ints, ints)


def test_a_model_without_rows_is_refused_by_name():
    @jax.tree_util.register_static
    class Short(Counts):
        def __call__(self, tokens, cache, batch):
            return super().__call__(tokens, cache, batch)

    for call in (jaxkv.generate, jaxkv.beam_search):
        with pytest.raises(ValueError, match="Short does not accept rows, as"):
            call(Short(), PROMPTS, CONFIG)


def test_keys_of_both_kinds_draw():
    options = dict(max_new_tokens=4, sampling=jaxkv.Sampling(temperature=1.0))
    new, old = (jaxkv.generate(Counts(), PROMPTS, CONFIG, key=key, **options).tokens for key in KEYS)
    assert new == old


def test_a_decode_step_whose_logits_are_not_one_row_a_sequence_is_refused():
    class LastOnly(Counts):
        def __call__(self, tokens, cache, batch, *, rows=None):
            last = tokens.shape[0] - 1
            return super().__call__(tokens, cache, batch, rows=jnp.array([last]) if rows is None else rows)

    jax.tree_util.register_static(LastOnly)
    with pytest.raises(ValueError, match=r"float logits \[2, vocab\] for tokens \[2\], not float32\[1, 8\]"):
        jaxkv.generate(LastOnly(), PROMPTS, CONFIG)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (lambda logits, cache: logits, r"tuple \(logits, cache\), not a"),
        (lambda logits, cache: (logits, cache, logits), r"tuple \(logits, cache\), not a tuple of 3"),
        (lambda logits, cache: (cache, logits), "must return float logits"),
        (lambda logits, cache: (logits[None], cache), r"not float32\[1, 2, 8\]"),
        (lambda logits, cache: (logits.astype(jnp.int32), cache), "not int32"),
        (lambda logits, cache: (logits, logits), "must return the cache that append returned"),
    ],
)
def test_other_results_than_logits_and_a_cache_are_refused(results, message):
    with pytest.raises(ValueError, match=f"Counts must return .*{message}|{message}"):
        jaxkv.generate(Counts(results=results), PROMPTS, CONFIG)


def test_a_cache_with_more_layers_than_the_model_is_refused_by_their_numbers():
    config = replace(CONFIG, num_layers=4)
    with pytest.raises(ValueError, match=r"appends nothing to layers \[2, 3\] .* num_layers=4.* writes 2"):
        jaxkv.generate(Counts(2), PROMPTS, config, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"layers \[2, 3\]"):
        jaxkv.generate(Counts(2, scanned=True), PROMPTS, config, max_new_tokens=1)


@pytest.mark.parametrize("quantization", [None, "int8", "fp8", "int4"])
def test_what_a_layer_was_given_counts_in_any_format_even_zeros(quantization):
    """Among the three prompts one is refused and one is padding; then there are no tokens at all."""
    config = replace(CONFIG, num_layers=4, dtype="bfloat16", quantization=quantization)
    step = jax.jit(prefill_checked, donate_argnames="cache")
    tokens = jnp.zeros(40, jnp.int32)
    for lengths in ([33, 5, 2], [0, 0, 0]):
        cache, seqs = jaxkv.init(config), jnp.array([0, -1, 1])
        _, cache, _, unwritten = step(Counts(2), cache, seqs, jnp.array(lengths), tokens)
        assert unwritten.tolist() == [False, False, *[sum(lengths) > 0] * 2]
        jaxkv.check_invariants(cache)


def test_an_unwritten_layer_of_a_given_cache_is_found_behind_its_tokens():
    config = replace(CONFIG, num_layers=3)
    first = jaxkv.generate(Counts(3), PROMPTS, config, max_new_tokens=1, keep=True)
    with pytest.raises(ValueError, match="appends nothing to layer 2 of the cache"):
        jaxkv.generate(Counts(2), [[1], [1]], cache=first, max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "stop_tokens", "message"),
    [
        (
            [[1], [2, 8]],
            (),
            "prompt 1: token id 8 is beyond the vocabulary of Counts, which has 8 tokens: 0 to 7",
        ),
        ([[1]], (9, 2), "stop_tokens: token id 9"),
        ([[2**31 - 1]], (), "prompt 0: token id 2147483647"),
    ],
)
@pytest.mark.parametrize("max_new_tokens", [0, 3])
def test_token_ids_beyond_the_vocabulary_are_refused_before_anything_runs(
    prompts, stop_tokens, message, max_new_tokens
):
    ran = []
    model = Counts(
        results=lambda logits, cache: (jax.debug.callback(lambda: ran.append(1)), (logits, cache))[1]
    )
    with pytest.raises(ValueError, match=message):
        jaxkv.generate(model, prompts, CONFIG, stop_tokens=stop_tokens, max_new_tokens=max_new_tokens)
    assert not ran


def test_the_last_id_of_the_vocabulary_is_no_mistake():
    result = jaxkv.generate(
        Counts(), [[7], np.array([6])], CONFIG, stop_tokens=[np.int64(7)], max_new_tokens=2
    )
    assert result.tokens == [[[0, 1]], [[7]]]


def test_mass_of_another_shape_is_refused():
    class Mass(Counts):
        def __call__(self, tokens, cache, batch, *, rows=None, return_mass=False):
            logits, cache = super().__call__(tokens, cache, batch, rows=rows)
            return logits, cache, jnp.zeros((2, 1, 32))

    jax.tree_util.register_static(Mass)
    with pytest.raises(ValueError, match=r"Mass must return mass \[2, 2, 1, 32\], not \[2, 1, 32\]"):
        jaxkv.generate(Mass(), PROMPTS, CONFIG, policy=jaxkv.policies.HeavyHitter(8, 4))


def test_what_a_signature_names_is_exported():
    assert jaxkv.Policy is jaxkv.policies.Policy
    assert jaxkv.CausalLM.__call__.__doc__ and jaxkv.Generation.__doc__


def test_generation_keeps_its_dtypes_under_x64():
    """This model's logits are then float64."""
    settings = [jaxkv.Sampling(temperature=0.1, top_k=1), jaxkv.Sampling()]
    options = dict(max_new_tokens=[3, 2], sampling=settings, keep_logits=True)
    with jax.enable_x64(True):
        result = jaxkv.generate(Counts(), PROMPTS, CONFIG, **options)
    assert result.tokens == [[[6, 7, 0]], [[7, 0]]] and result.logits.dtype == jnp.float32
