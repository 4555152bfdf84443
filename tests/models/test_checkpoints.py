"""Loaded Hugging Face checkpoints give PyTorch's logits, with dense attention and with the cache."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.models import ModelConfig, abstract_model, dense_logits, load, random_model
from jaxkv.rope import Llama3Scaling

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = ("llama_tied_sharded", "llama_untied", "qwen2_bf16", "mistral_window", "mistral_contradictions")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request):
    folder = FIXTURES / request.param
    with np.load(folder / "logits.npz") as saved:
        return load(folder), saved["tokens"], saved["logits"]


def test_dense_logits_are_pytorchs(checkpoint):
    loaded, tokens, logits = checkpoint
    lengths = jnp.full(len(tokens), tokens.shape[1])
    got = jax.jit(dense_logits)(loaded.model, jnp.asarray(tokens), lengths)
    np.testing.assert_allclose(got, logits, **CLOSE)


def test_dense_logits_past_a_length_are_zero(checkpoint):
    loaded, tokens, logits = checkpoint
    got = jax.jit(dense_logits)(loaded.model, jnp.asarray(tokens), jnp.asarray([40, 7, 0]))
    np.testing.assert_allclose(got[1, :7], logits[1, :7], **CLOSE)
    assert not np.any(got[1, 7:]) and not np.any(got[2])


def ragged_chunks(tokens, counts):
    """The tokens of each step, one sequence after the other, and the step's counts."""
    done = np.zeros(len(tokens), int)
    for step in counts:
        rows = [tokens[i, done[i] : done[i] + n] for i, n in enumerate(step)]
        done += step
        yield np.concatenate(rows), np.asarray(step), done - step


def test_paged_logits_in_ragged_chunks_are_pytorchs(checkpoint):
    """Prompts go in by uneven chunks that cross page borders, then token by token."""
    loaded, tokens, logits = checkpoint
    config = loaded.config.cache_config(num_pages=40, page_size=4, max_seqs=4, dtype="float32")
    cache = jaxkv.init(config)
    slots = jnp.asarray([2, 0, 3])

    @jax.jit
    def step(model, cache, counts, chunk):
        cache, batch = jaxkv.allocate(cache, slots, counts, total_tokens=chunk.shape[0])
        logits, cache = model(chunk, cache, batch)
        return logits, cache, batch.status

    counts = [(5, 13, 1), (13, 1, 5), (1, 5, 13)] + [(1, 1, 1)] * 6
    for chunk, number, start in ragged_chunks(tokens, counts):
        padded = np.pad(chunk, (0, 20 - len(chunk)))
        got, cache, status = step(loaded.model, cache, jnp.asarray(number), jnp.asarray(padded))
        assert not np.any(status)
        expected = [logits[i, start[i] : start[i] + n] for i, n in enumerate(number)]
        np.testing.assert_allclose(got[: len(chunk)], np.concatenate(expected), **CLOSE)
    jaxkv.check_invariants(cache)


def test_rows_picks_the_logits_of_some_tokens():
    folder = FIXTURES / "llama_untied"
    with np.load(folder / "logits.npz") as saved:
        loaded, tokens, logits = load(folder), saved["tokens"], saved["logits"]
    config = loaded.config.cache_config(num_pages=8, page_size=16, max_seqs=1, dtype="float32")
    cache, batch = jaxkv.allocate(jaxkv.init(config), jnp.asarray([0]), jnp.asarray([40]), total_tokens=40)
    run = jax.jit(lambda model, chunk, cache, batch, rows: model(chunk, cache, batch, rows=rows)[0])
    got = run(loaded.model, jnp.asarray(tokens[0]), cache, batch, jnp.asarray([39, 3]))
    np.testing.assert_allclose(got, logits[0, [39, 3]], **CLOSE)


def test_mass_of_every_layer_comes_with_the_logits():
    folder = FIXTURES / "mistral_window"
    with np.load(folder / "logits.npz") as saved:
        loaded, tokens, logits = load(folder), jnp.asarray(saved["tokens"]), saved["logits"]
    sizes = dict(num_pages=8, page_size=16, max_seqs=1, dtype="float32")
    # Of layers that keep every token: those that release what is outside their window have none to give.
    config = loaded.config.cache_config(**sizes, layer_windows=None)

    @jax.jit
    def run(model):
        cache, batch = jaxkv.allocate(
            jaxkv.init(config), jnp.asarray([0]), jnp.asarray([40]), total_tokens=40
        )
        got, _, mass = model(tokens[0], cache, batch, return_mass=True)
        return got, mass

    got, mass = run(loaded.model)
    np.testing.assert_allclose(got, logits[0], **CLOSE)
    sizes = loaded.config
    assert mass.shape == (sizes.num_layers, 1, sizes.num_kv_heads, config.max_tokens_per_seq)
    np.testing.assert_allclose(mass.sum(axis=(1, 2, 3)), 40.0 * sizes.num_q_heads, rtol=1e-5)


def test_matrices_take_the_dtype_asked_for_and_vectors_stay_float32():
    model = load(FIXTURES / "qwen2_bf16", dtype="bfloat16").model
    block = model.blocks[0]
    assert block.qkv_weight[...].dtype == model.embedding[...].dtype == jnp.bfloat16
    assert block.qkv_bias[...].dtype == model.final_norm[...].dtype == jnp.float32
    q, k, v = block.qkv(model.embed(jnp.asarray([1, 2])), jnp.asarray([0, 1]))
    assert q.dtype == k.dtype == v.dtype == jnp.bfloat16


def test_one_bfloat16_token_gets_the_logits_it_gets_among_others():
    folder = FIXTURES / "qwen2_bf16"
    model = load(folder, dtype="bfloat16").model
    tokens = jnp.asarray([[5, 9]])
    pair = jax.jit(dense_logits)(model, tokens, jnp.asarray([2]))
    alone = jax.jit(dense_logits)(model, tokens[:, :1], jnp.asarray([1]))
    np.testing.assert_allclose(alone[0, 0], pair[0, 0], atol=0.05)


def test_bfloat16_logits_are_near_float32s():
    folder = FIXTURES / "qwen2_bf16"
    with np.load(folder / "logits.npz") as saved:
        tokens, logits = jnp.asarray(saved["tokens"]), saved["logits"]
    model = load(folder, dtype=jnp.bfloat16).model
    got = jax.jit(dense_logits)(model, tokens, jnp.full(3, 40))
    assert got.dtype == jnp.float32
    assert np.mean(np.abs(got - logits)) < 0.02 * np.std(logits)


def test_progress_ends_with_all_bytes():
    seen = []
    load(FIXTURES / "llama_tied_sharded", progress=lambda done, total: seen.append((done, total)))
    dones, totals = zip(*seen, strict=True)
    assert list(dones) == sorted(dones) and dones[-1] == totals[0] == 74368
    assert set(totals) == {74368}


def test_config_reads_both_places_of_the_rotary_settings():
    new = ModelConfig.from_hf(FIXTURES / "llama_tied_sharded")
    assert new.rope_scaling == Llama3Scaling(
        factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=32
    )
    assert (new.rope_theta, new.rms_norm_eps, new.head_dim, new.window) == (10000.0, 1e-6, 8, None)
    assert ModelConfig.from_hf(FIXTURES / "mistral_window").window == 7


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "max_context": 64,
}  # fmt: skip


def test_random_and_abstract_models_have_the_same_shapes():
    config = ModelConfig(**SIZES, qkv_bias=True)
    real = jax.jit(lambda key: random_model(config, key, jnp.bfloat16))(jax.random.key(0))
    abstract = abstract_model(config, jnp.bfloat16)
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(m)] for m in (real, abstract)]
    assert shapes[0] == shapes[1]


def test_an_abstract_eight_billion_parameter_step_lowers():
    config = ModelConfig(
        vocab_size=128256, hidden_size=4096, num_layers=32, num_q_heads=32, num_kv_heads=8,
        head_dim=128, intermediate_size=14336, max_context=131072,
    )  # fmt: skip
    model = abstract_model(config, jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 8_030_261_248
    out = jax.eval_shape(
        dense_logits,
        model,
        jax.ShapeDtypeStruct((1, 4), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    assert out.shape == (1, 4, 128256)


def test_a_hundred_calls_trace_once():
    model, traces = random_model(ModelConfig(**SIZES), jax.random.key(0)), []

    @jax.jit
    def run(model, tokens):
        traces.append(1)
        return dense_logits(model, tokens, jnp.asarray([3]))

    for token in range(100):
        run(model, jnp.asarray([[token % 64, 1, 2]]))
    assert len(traces) == 1
