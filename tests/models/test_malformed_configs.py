"""Whatever a `config.json` holds, its readers refuse it in one short line that names the field."""

import random

import pytest

from jaxkv.models import ModelConfig
from jaxkv.models.families.registry import BY_MODEL_TYPE
from jaxkv.planner import ModelShape, plan
from tests.models.test_model_config import LLAMA

ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0, "partial_rotary_factor": 1.0,
}  # fmt: skip
EXPERTS = {
    "num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "decoder_sparse_step": 1, "mlp_only_layers": [0], "q_lora_rank": 64, "kv_lora_rank": 64,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
}  # fmt: skip
# Every field that a reader looks at, with a value that is right for one architecture or another.
FIELDS = {
    **LLAMA, **EXPERTS,
    "head_dim": 128, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 8,
    "sliding_window_pattern": 2, "layer_types": ["full_attention"] * 32, "rope_scaling": ROPE,
    "rope_parameters": ROPE, "original_max_position_embeddings": 8192, "partial_rotary_factor": 1.0,
    "quantization_config": {"quant_method": "fp8"}, "quantization": {"group_size": 64, "bits": 4},
    "dtype": "bfloat16", "torch_dtype": "bfloat16", "text_config": None, "new_decoder_architecture": True,
    "multi_query": False, "parallel_attn": True, "bias": False, "n_inner": 64, "ffn_hidden_size": 64,
}  # fmt: skip
WRONG = [
    "x" * 500, "4096", "", 0, 1, -1, 10**400, 2.5, -0.5, 1e308, float("nan"), float("inf"), True, False, None,
    [], [5], ["sliding_attention"] * 32, ["full_attention", {}], [[1]], {}, {"a": {"b": "c" * 300}},
    {str(name): name for name in range(100)}, {"full_attention": ROPE},
]  # fmt: skip
MOST = 250


def changes():
    """A config with one field changed to something wrong, the fields within objects too."""
    for name in FIELDS:
        yield from ((name, value) for value in WRONG)
    for outer in ("rope_scaling", "rope_parameters", "quantization_config", "quantization"):
        inner = ROPE if outer.startswith("rope") else {"quant_method": "x", "group_size": 64, "bits": 4}
        for name in [*inner, "type", "mode"]:
            yield from ((outer, inner | {name: value}) for value in WRONG)


def assert_read_or_refused(read, raw, change):
    try:
        read(raw)
    except ValueError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) <= MOST, (change, text)
        return text
    except Exception as error:
        raise AssertionError(f"{change!r:.200} ends in {error!r}") from error
    return None


@pytest.mark.parametrize("kind", sorted(BY_MODEL_TYPE))
def test_a_model_config_with_any_wrong_value_is_read_or_refused(kind):
    for name, value in changes():
        raw = LLAMA | {"rope_scaling": ROPE} if name != "rope_parameters" else dict(LLAMA)
        assert_read_or_refused(ModelConfig.from_hf, raw | {"model_type": kind} | {name: value}, (name, value))


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3_moe", "mixtral", "gemma3_text", "gpt_oss", "deepseek_v3",
             "gpt2", "falcon"],
)  # fmt: skip
def test_a_plan_of_a_config_with_any_wrong_value_is_made_or_refused(kind):
    def read(raw):
        shape = ModelShape.from_config(raw)
        plan(shape, "H100", context=16, page_size=16)

    for name, value in changes():
        raw = LLAMA | EXPERTS | {"sliding_window": 8, "head_dim": 128, "model_type": kind}
        assert_read_or_refused(read, raw | {name: value}, (name, value))


def test_several_wrong_values_at_once_are_read_or_refused():
    rng, every = random.Random(0), list(changes())
    for _ in range(2000):
        chosen = dict(rng.sample(every, 3))
        kind = {"model_type": rng.choice(sorted(BY_MODEL_TYPE))}
        assert_read_or_refused(ModelConfig.from_hf, LLAMA | kind | chosen, chosen)
        assert_read_or_refused(ModelShape.from_config, LLAMA | kind | chosen, chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": 5}, "layer_types must be a list of strings, not 5"),
        ({"layer_types": ["full_attention"]}, "layer_types must have an entry for each of 32 layers, not 1"),
        ({"rope_theta": 10**400}, "rope_theta must be a number, not an integer of 1,329 bits"),
        ({"quantization": {"bits": 4, "group_size": 64, "mode": "affine", "more": {}}},
         "quantization {'bits': 4, 'group_size': 64, ...} is not supported"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_shown_in_short_beside_its_field(change, message):
    with pytest.raises(ValueError) as raised:
        ModelConfig.from_hf(LLAMA | change)
    assert str(raised.value) == message


@pytest.mark.parametrize("read", [ModelConfig.from_hf, ModelShape.from_config])
@pytest.mark.parametrize("value", ["x", 0, -1, 10**400, 2.5, True, [], {}])
def test_a_number_out_of_range_or_of_another_kind_is_refused_by_the_name_in_the_file(read, value):
    for name in [name for name, right in LLAMA.items() if type(right) is int]:
        with pytest.raises(ValueError) as raised:
            read(LLAMA | {name: value})
        assert str(raised.value).startswith(f"{name} must be an integer")
