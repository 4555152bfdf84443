"""Reading `config.json`: what is supported, what is refused, and that the message names it."""

import json

import pytest

import jaxkv
from jaxkv.models import ModelConfig
from jaxkv.rope import LinearScaling, Llama3Scaling

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}


def test_head_dim_and_kv_heads_have_their_defaults():
    raw = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    config = ModelConfig.from_hf(raw)
    assert (config.num_kv_heads, config.head_dim) == (32, 128)
    assert not config.qkv_bias and not config.tied_embeddings and config.rope_pairing == "half"
    assert config == ModelConfig.from_hf(raw) and hash(config) == hash(ModelConfig.from_hf(raw))


def test_qwen2_has_biases_and_no_window():
    config = ModelConfig.from_hf(QWEN2 | {"tie_word_embeddings": True})
    assert config.qkv_bias and config.tied_embeddings and config.window is None


def test_mistral_keeps_its_window():
    raw = LLAMA | {"model_type": "mistral"}
    assert ModelConfig.from_hf(raw | {"sliding_window": 4096}).window == 4096
    assert ModelConfig.from_hf(raw | {"sliding_window": None}).window is None


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_scaling_is_read(key):
    config = ModelConfig.from_hf(LLAMA | {"rope_scaling": {key: "linear", "factor": 2}})
    assert config.rope_scaling == LinearScaling(factor=2.0)


def test_an_older_rope_scaling_replaces_rope_parameters_as_a_whole():
    config = ModelConfig.from_hf(
        LLAMA
        | {"rope_scaling": {"type": "linear", "factor": 4.0}}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    )
    assert (config.rope_scaling, config.rope_theta) == (LinearScaling(factor=4.0), 500000.0)


def test_the_original_positions_of_llama3_scaling_may_lie_outside_or_be_the_trained_ones():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for outside, original in (({}, 131072), ({"original_max_position_embeddings": 64}, 64)):
        config = ModelConfig.from_hf(LLAMA | {"rope_scaling": scaling} | outside)
        assert isinstance(config.rope_scaling, Llama3Scaling)
        assert (config.rope_scaling.original_max_position, config.max_context) == (original, 131072)


def test_linear_scaling_multiplies_the_context():
    config = ModelConfig.from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert config.max_context == 4 * 131072


def test_mistral_without_a_window_field_has_the_usual_window():
    assert ModelConfig.from_hf(LLAMA | {"model_type": "mistral"}).window == 4096


def test_mistral_has_its_window_only_in_the_layers_that_layer_types_names():
    kinds = ["full_attention", "sliding_attention"] * 16
    raw = LLAMA | {"model_type": "mistral", "sliding_window": 7}
    assert ModelConfig.from_hf(raw | {"layer_types": kinds}).windows == (None, 7) * 16
    assert ModelConfig.from_hf(raw | {"layer_types": ["full_attention"] * 32}).window is None
    with pytest.raises(ValueError, match="layer_types has sliding_attention, but sliding_window is null"):
        ModelConfig.from_hf(raw | {"layer_types": kinds, "sliding_window": None})


def test_cache_config_takes_the_models_sizes():
    got = ModelConfig.from_hf(LLAMA).cache_config(num_pages=4, page_size=8, dtype="float32")
    assert got == jaxkv.CacheConfig(
        num_layers=32, num_kv_heads=8, head_dim=128, num_pages=4, page_size=8, dtype="float32"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "rwkv"},
            "model_type 'rwkv' is not supported; supported: ",
        ),
        ({"model_type": None}, "'model_type' is missing"),
        ({"hidden_size": None}, "field 'hidden_size' is missing"),
        ({"hidden_size": 0}, "hidden_size must be an integer from 1 to 131072, not 0"),
        ({"hidden_size": "4096"}, "hidden_size must be an integer, not '4096'"),
        ({"num_attention_heads": -1}, "num_attention_heads must be an integer from 1 to"),
        ({"num_key_value_heads": 5}, "num_key_value_heads must divide num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer, not True"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"head_dim": 7}, "head_dim must be even, not 7"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must lie between"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must lie between"),
        ({"rope_theta": float("inf")}, "rope_theta must be a finite number"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": "yes"}, "attention_bias 'yes' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_scaling 'ntk' is not supported"),
        (
            {"rope_scaling": {"rope_type": "ntk"}, "rope_parameters": {"rope_type": "default"}},
            "'ntk' is not",
        ),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling needs a rope_type beside 'factor'"),
        ({"rope_parameters": {"factor": 4.0}}, "rope_scaling needs a rope_type beside 'factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "field 'factor' is missing"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": -1.0}},
            "factor must be a positive number, not -1.0",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": -2.0}},
            "factor must be a positive number, not -2.0",
        ),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "field 'factor' is missing"),
        ({"rope_scaling": 3}, "rope_scaling must be an object"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    ],
)
def test_a_bad_field_is_named(change, message):
    with pytest.raises(ValueError) as raised:
        ModelConfig.from_hf(LLAMA | change)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_qwen2_window_is_refused():
    with pytest.raises(ValueError, match="use_sliding_window True is not supported"):
        ModelConfig.from_hf(QWEN2 | {"use_sliding_window": True})


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="cannot be read"):
        ModelConfig.from_hf(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: is not JSON"):
        ModelConfig.from_hf(tmp_path)
    path.write_text(json.dumps([LLAMA]))
    with pytest.raises(ValueError, match="must hold a JSON object"):
        ModelConfig.from_hf(path)
