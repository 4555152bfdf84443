"""GGUF files: the same logits as the checkpoint they were made from, every type, every damage."""

from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.models import ModelConfig, ModelLoadError, dense_logits, load
from jaxkv.models.tensor_names import GGUF_NAMES as NAMES
from jaxkv.models.weights import expected_shapes
from jaxkv.planner import ModelShape
from jaxkv.rope import FrequencyFactors, LinearScaling, inverse_frequencies
from tests.models import gguf_files
from tests.models.gguf_files import Types

FIXTURES = Path(__file__).parents[1] / "fixtures"
UNTIED = FIXTURES / "llama_untied"


def assert_pytorchs_logits(path, folder):
    with np.load(folder / "logits.npz") as saved:
        tokens, logits = jnp.asarray(saved["tokens"]), saved["logits"]
    got = jax.jit(dense_logits)(load(path).model, tokens, jnp.full(len(tokens), tokens.shape[1]))
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama_untied", "qwen2_bf16"])
def test_logits_are_pytorchs(tmp_path, name):
    path = gguf_files.write_checkpoint(tmp_path / "m.gguf", FIXTURES / name)
    assert_pytorchs_logits(path, FIXTURES / name)


def test_llama3_scaling_comes_as_frequency_factors(tmp_path):
    folder = FIXTURES / "llama_tied_sharded"
    config = ModelConfig.from_hf(folder)
    plain = inverse_frequencies(config.head_dim, config.rope_theta, None)
    factors = plain / inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    path = gguf_files.write_checkpoint(tmp_path / "m.gguf", folder, replace={"rope_freqs.weight": factors})
    assert isinstance(load(path).config.rope_scaling, FrequencyFactors)
    assert load(path).config.tied_embeddings
    assert_pytorchs_logits(path, folder)


SIZES = {
    "vocab_size": 96, "hidden_size": 256, "num_layers": 1, "num_q_heads": 4, "num_kv_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512, "max_context": 64, "qkv_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", [Types.Q8_0, Types.Q5_0, Types.Q4_0, Types.Q4_1, Types.Q4_K, Types.Q6_K])
def test_quantized_weights_are_the_packages_dequantized_ones(tmp_path, kind):
    """Every matrix of a file is quantized; the model holds exactly what `gguf` makes of it."""
    rng, config = np.random.default_rng(0), ModelConfig(**SIZES)
    tensors, wanted = {}, {}
    for name, shape in expected_shapes(config, NAMES).items():
        if len(shape) == 1:
            tensors[name] = wanted[name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            tensors[name] = gguf_files.quantized_blocks(rng, shape, kind)
            wanted[name] = gguf.quants.dequantize(tensors[name], kind)
    raw = {
        "model_type": "qwen2", "num_hidden_layers": 1, "max_position_embeddings": 64, "hidden_size": 256,
        "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 10000.0},
    }  # fmt: skip
    fields = gguf_files.metadata(raw) | gguf_files.TOKENIZER
    types = {name: kind for name in tensors if tensors[name].dtype == np.uint8}
    path = gguf_files.write(tmp_path / "m.gguf", fields, tensors, types)
    model = load(path).model
    for parameter, held in [
        ("embedding", model.embedding),
        ("unembedding", model.unembedding),
        ("blocks.0.qkv", model.blocks[0].qkv_weight),
        ("blocks.0.qkv_bias", model.blocks[0].qkv_bias),
        ("blocks.0.out", model.blocks[0].out_weight),
        ("blocks.0.gate_up", model.blocks[0].gate_up_weight),
        ("blocks.0.down", model.blocks[0].down_weight),
    ]:
        expected = np.concatenate([wanted[name] for name in NAMES.parts(parameter)])
        np.testing.assert_array_equal(held[...], expected)


@pytest.mark.parametrize("kind", [Types.F16, Types.BF16])
def test_half_precision_tensors_are_read(tmp_path, kind):
    raw, tensors = gguf_files.convert(UNTIED)
    types = {name: kind for name, tensor in tensors.items() if tensor.ndim == 2}
    halves = {
        name: gguf.quants.quantize(tensor, kind) if name in types else tensor
        for name, tensor in tensors.items()
    }
    fields = gguf_files.metadata(raw) | gguf_files.TOKENIZER
    path = gguf_files.write(tmp_path / "m.gguf", fields, halves, types)
    expected = gguf.quants.dequantize(halves["output.weight"], kind)
    np.testing.assert_array_equal(load(path).model.unembedding[...], expected)


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, 4.0),
        ({"scaling.factor": 4.0}, 4.0),
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 2.0, "scale_linear": 4.0}, 2.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.factor": 0.0}, None),
    ],
    ids=str,
)
def test_a_factor_is_of_linear_scaling_unless_the_type_says_otherwise(tmp_path, fields, factor):
    replace = {f"llama.rope.{name}": value for name, value in fields.items()}
    path = gguf_files.write_checkpoint(tmp_path / "m.gguf", UNTIED, replace=replace)
    config = load(path).config
    assert config.rope_scaling == (factor and LinearScaling(factor=factor))
    assert config.max_context == 128 * (factor or 1)
    assert ModelShape.from_config(path).max_context == config.max_context


DOWN = "blk.1.ffn_down.weight"


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"general.architecture": "rwkv6"}, "architecture 'rwkv6' is not supported; supported: llama,"),
        ({DOWN: None}, f"tensor '{DOWN}' is missing"),
        ({DOWN: np.ones((32, 47), np.float32)}, f"tensor '{DOWN}' has shape (32, 47), expected (32, 48)"),
        ({DOWN: np.full((32, 48), np.nan, np.float32)}, f"tensor '{DOWN}' holds NaN"),
        ({DOWN: np.full((32, 48), np.inf, np.float32)}, f"tensor '{DOWN}' holds NaN or infinite"),
        ({DOWN: np.ones((32, 48), np.int32)}, f"tensor '{DOWN}' is of type I32"),
        ({"blk.0.more": np.ones(64, np.float32)}, "'blk.0.more' is not part of this model"),
        ({"rope_freqs.weight": np.zeros(8, np.float32)}, "factors must be positive, not 0.0"),
        ({"rope_freqs.weight": np.ones(7, np.float32)}, "rope_scaling needs 8 factors, not 7"),
        ({"llama.block_count": None}, "no field 'llama.block_count'"),
        ({"llama.block_count": 0}, "num_layers must be"),
        ({"llama.block_count": "2"}, "'llama.block_count' must be an integer, not '2'"),
        ({"llama.attention.head_count": 0}, "num_q_heads must be"),
        ({"llama.attention.head_count_kv": 3}, "num_kv_heads must divide"),
        ({"llama.expert_count": 8}, "no field 'llama.expert_used_count'"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 9}, "experts' per_token must be"),
        ({"llama.attention.sliding_window": 7}, "'llama.attention.sliding_window' = 7 is not supported"),
        ({"llama.rope.dimension_count": 8}, "'llama.rope.dimension_count' = 8 is not supported"),
        ({"split.count": 3}, "is one of 3 parts"),
        ({"token_embd.weight": None}, "tensor 'token_embd.weight' is missing"),
        ({"llama.rope.scaling.type": "linear"}, "no field 'llama.rope.scaling.factor'"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "no field 'llama.rope.scaling.factor'"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
          "llama.rope.scaling.attn_factor": 1.5}, "'llama.rope.scaling.attn_factor' = 1.5 is not supported"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores must hold a score for each token"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, "tokenizer.ggml.pre 'kimi-k2' is not supported"),
        ({"token_embd.weight": np.ones(96, np.float32)}, "tensor 'token_embd.weight' has shape (96,)"),
        ({"llama.block_count": 2**16}, "has 21 tensors for 65536 layers"),
        ({"tokenizer.ggml.merges": ["h zz"]}, "merge 'h zz' is not of the vocabulary"),
        ({"tokenizer.ggml.tokens": None}, "'tokenizer.ggml.tokens'"),
        ({"tokenizer.ggml.eos_token_id": 96}, "tokenizer.ggml.eos_token_id 96 is not a token"),
        ({"tokenizer.ggml.tokens": [*gguf_files.TOKENS, "more"], "tokenizer.ggml.token_type": None},
         "the tokenizer has 97 tokens, the model only 96"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_that_names_it(tmp_path, replace, message):
    path = gguf_files.write_checkpoint(tmp_path / "bad.gguf", UNTIED, replace=replace)
    with pytest.raises(ModelLoadError) as raised:
        load(path)
    text = str(raised.value)
    assert text.startswith(str(path)) and message in text and "\n" not in text


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 24, 100, 1000, 5000, 20000, -4096, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    whole = gguf_files.write_checkpoint(tmp_path / "whole.gguf", UNTIED).read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:kept])
    with pytest.raises(ModelLoadError) as raised:
        load(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_random_damage_to_the_header_never_escapes_as_another_error(tmp_path):
    whole = np.frombuffer(gguf_files.write_checkpoint(tmp_path / "m.gguf", UNTIED).read_bytes(), np.uint8)
    rng, path = np.random.default_rng(0), tmp_path / "damaged.gguf"
    for _ in range(60):
        damaged = whole.copy()
        places = rng.integers(4, 6000, 3)
        damaged[places] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            load(path)
        except ModelLoadError as error:
            assert str(error).startswith(str(path))


def test_what_is_not_a_gguf_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelLoadError, match=r"model\.gguf: is not a GGUF file"):
        load(path)
