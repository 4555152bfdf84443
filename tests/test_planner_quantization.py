"""Plans of repositories whose weights are quantized, without a dtype given by hand."""

import json

import pytest

from jaxkv.planner import ModelShape, plan

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
EMBEDDINGS = 2 * 128256 * 8192


def group(**weights):
    return {"config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "fbgemm_fp8"}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 4 + 20 / 128),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128, "desc_act": True}, 3 + 19 / 128),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4.127),
        ({"quant_method": "compressed-tensors", **group(num_bits=8, type="float", strategy="channel")}, 8),
        ({"quant_method": "compressed-tensors", **group(num_bits=4, type="int", group_size=128)}, 4.125),
        ({"quant_method": "compressed-tensors", **group(num_bits=4, type="float", group_size=16)}, 4.5),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        ({"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}, 4.5),
    ],
    ids=str,
)
def test_weights_have_the_bits_that_their_method_stores(options, bits):
    model = ModelShape.from_config(LLAMA_70B | {"quantization_config": options})
    linear = model.num_parameters - EMBEDDINGS
    # Embeddings and the output projection stay in 16 bits.
    assert plan(model, "H100").weights == pytest.approx((linear * bits + EMBEDDINGS * 16) / 8, rel=1e-4)


def test_hf_quant_config_says_how_a_repository_is_stored(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    quantized = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantized))
    weights = plan(ModelShape.from_config(tmp_path), "H100").weights
    assert round(weights / 2**30) == 68  # 131 in 16 bits


@pytest.mark.parametrize("text", ["{}", "[]", '{"quantization": 4}', '{"quantization": {"quant_algo": 4}}'])
def test_a_damaged_hf_quant_config_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    (tmp_path / "hf_quant_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"(quantization|quant_algo|JSON object)") as error:
        ModelShape.from_config(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"quant_method": "aqlm"},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {n: {"weights": {"num_bits": n}} for n in (4, 8)},
        },
    ],
    ids=str,
)
def test_what_a_repository_does_not_say_needs_a_dtype_by_hand(options):
    model = ModelShape.from_config(LLAMA_70B | {"quantization_config": options})
    with pytest.raises(ValueError, match="say how with weights_dtype"):
        plan(model, "H100")


def test_only_experts_are_quantized_where_attention_is_left_out():
    options = {"quant_method": "compressed-tensors", **group(num_bits=4, type="int", group_size=32)}
    mixtral = LLAMA_70B | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    ignored = {**options, "ignore": ["lm_head", "re:.*self_attn.*"]}
    model = ModelShape.from_config(mixtral | {"quantization_config": ignored})
    assert plan(model, "H100").weight_bits == (16.0, 4.5, 16.0)
    # In a model without experts, what is left is not known.
    with pytest.raises(ValueError, match="say how with weights_dtype"):
        plan(ModelShape.from_config(LLAMA_70B | {"quantization_config": ignored}), "H100")
