"""The planner on published configs: bytes of K and V at 8,192 tokens of 16 bits, and number of parameters."""

import copy
import json
import random
from pathlib import Path

import pytest

from jaxkv import catalog
from jaxkv.planner import ModelShape, kv_cache_bytes, plan
from jaxkv.planner.encoders import encoder_weights

CASES = json.loads((Path(__file__).parent / "fixtures/planner/cases.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_published_configs_take_the_bytes_and_parameters_they_should(name):
    case = CASES[name]
    model = ModelShape.from_config(case["config"])
    assert kv_cache_bytes(model, 8192, kv_dtype="bf16").exact == case["kv_bytes_8192"]
    if case.get("params") is not None:
        assert model.num_parameters == pytest.approx(case["params"], rel=0.01)


def test_an_unknown_model_type_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"model_type 'mamba' is not known; known: .*jamba.* and \d+ others"):
        ModelShape.from_config({"model_type": "mamba"})


# What `transformers` 5.23 makes of a class's defaults with these changes: number of weights.
CLASSES = [
    ("jamba", dict(num_hidden_layers=8), 13295237088),
    (
        "granitemoehybrid",
        dict(num_hidden_layers=4, layer_types=["mamba", "attention", "mamba", "mamba"]),
        5018284672,
    ),
    (
        "granitemoehybrid",
        dict(
            num_hidden_layers=4,
            num_local_experts=0,
            layer_types=["attention", "attention", "attention", "attention"],
            attention_bias=True,
        ),
        581013504,
    ),
    (
        "falcon_h1",
        dict(
            num_hidden_layers=4,
            mamba_rms_norm=True,
            mamba_d_ssm=2048,
            mamba_d_head=16,
            attention_bias=True,
            mlp_bias=True,
            projectors_bias=True,
            mamba_proj_bias=True,
        ),
        2032445440,
    ),
    ("falcon_h1", dict(num_hidden_layers=4), 1981877760),
    ("nemotron_h", dict(hybrid_override_pattern="M-*E"), 1968355720),
    (
        "nemotron_h",
        dict(
            hybrid_override_pattern="M-*EE",
            moe_latent_size=1024,
            use_bias=True,
            mlp_bias=True,
            attention_bias=True,
            mamba_proj_bias=True,
        ),
        1796311584,
    ),
    ("glm4_moe", dict(num_hidden_layers=4, attention_bias=True, use_qk_norm=True, head_dim=128), 8509552000),
    ("minimax_m2", dict(num_hidden_layers=4), 15904071680),
    ("phimoe", dict(num_hidden_layers=4, attention_bias=True, lm_head_bias=True), 5464014144),
    ("olmoe", dict(num_hidden_layers=4), 3494938624),
    ("ernie4_5", dict(num_hidden_layers=4, use_bias=True), 162581504),
    ("ernie4_5_moe", dict(num_hidden_layers=4), 2758269632),
    ("qwen3_5_moe_text", dict(num_hidden_layers=4), 4381469760),
    (
        "gemma3n_text",
        dict(
            num_hidden_layers=10,
            num_kv_shared_layers=3,
            intermediate_size=[64, 64, 64, 64, 64, 64, 64, 64, 64, 64],
            activation_sparsity_pattern=[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ),
        1354751264,
    ),
    ("gemma4_text", dict(num_hidden_layers=12), 2393260544),
    (
        "gemma4_text",
        dict(
            num_hidden_layers=12,
            attention_k_eq_v=True,
            num_global_key_value_heads=2,
            hidden_size_per_layer_input=0,
            enable_moe_block=True,
            num_experts=8,
            top_k_experts=2,
            moe_intermediate_size=128,
        ),
        1637803360,
    ),
    ("gemma4_text", dict(num_hidden_layers=12, num_kv_shared_layers=5, use_double_wide_mlp=True), 2683452416),
    ("granitemoe", dict(num_hidden_layers=4, attention_bias=True), 4859334656),
    ("olmo", dict(num_hidden_layers=4), 1221591040),
    ("hunyuan_v1_dense", dict(num_hidden_layers=4, head_dim=128), 3192943616),
]


@pytest.mark.parametrize(("kind", "changes", "parameters"), CLASSES)
def test_parameters_are_those_of_the_classes_of_transformers(kind, changes, parameters):
    # A nested config leaves out what is its class's default.
    assert nested(kind, changes).num_parameters == parameters


def nested(kind, changes):
    return ModelShape.from_config({"text_config": {"model_type": kind, **changes}})


@pytest.mark.parametrize(
    ("kind", "changes", "layers", "state"),
    [
        # Of eight layers one has K and V; seven have 8,192 x (16 + 4) elements.
        ("jamba", dict(num_hidden_layers=8), 1, 7 * 8192 * 20),
        # 128 heads of 64 x 256, and 4 inputs of a convolution over 8,704 channels.
        (
            "granitemoehybrid",
            dict(num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"]),
            1,
            2 * (8192 * 256 + 8704 * 4),
        ),
        ("granitemoehybrid", dict(num_hidden_layers=2, layer_types=["attention"] * 2), 2, 0),
        # Every layer has K and V, and a state beside them.
        ("falcon_h1", dict(num_hidden_layers=4), 4, 4 * (1024 * 256 + 1536 * 4)),
        ("nemotron_h", dict(hybrid_override_pattern="M-*EM"), 1, 2 * (8192 * 128 + 10240 * 4)),
    ],
)
def test_layers_without_k_and_v_keep_states_of_fixed_size(kind, changes, layers, state):
    model = nested(kind, changes)
    assert (model.num_layers, model.state_elements) == (layers, state)
    # A prompt twice as long has the same states, and twice the K and V.
    short, long = (plan(model, "H100", context=n) for n in (4096, 8192))
    assert short.states == long.states == 4 * state
    assert long.kv.exact == 2 * short.kv.exact


def test_layers_that_share_k_and_v_keep_none_of_their_own():
    model = nested("gemma3n_text", dict(num_hidden_layers=10, num_kv_shared_layers=4))
    assert model.windows == (512, 512, 512, 512, None, 512)


@pytest.mark.parametrize(
    "said", [{}, {"per_layer_config": {"05": {"head_dim": 512, "num_key_value_heads": 2}}}]
)
def test_gemma_4_has_other_heads_in_layers_with_full_attention(said):
    changes = dict(num_hidden_layers=6, attention_k_eq_v=True, num_global_key_value_heads=2)
    model = nested("gemma4_text", changes | said)
    assert model.layer_elements == (2 * 4 * 256,) * 5 + (2 * 2 * 512,)
    made = plan(model, "H100", kv_dtype="bf16")
    assert made.kv.exact == (5 * 512 * 2048 + 8192 * 2048) * 2
    assert made.cache_config is not None
    assert made.cache_config.layer_head_dims == (256,) * 5 + (512,)
    assert made.kv.reserved >= made.kv.paged >= made.kv.exact


def test_mllama_keeps_k_and_v_of_the_text_in_layers_of_its_own():
    model = nested("mllama_text_model", {})
    assert model.num_layers == 32  # of 40; eight attend to images
    assert any("images" in note for note in model.notes)


def test_chatglm_names_its_fields_in_its_own_way():
    fields = dict(num_layers=28, hidden_size=4096, num_attention_heads=32, kv_channels=128, seq_length=32768)
    fields |= dict(ffn_hidden_size=13696, padded_vocab_size=65024, add_qkv_bias=True, add_bias_linear=False)
    fields |= dict(multi_query_attention=True, multi_query_group_num=2)
    model = ModelShape.from_config({"model_type": "chatglm"} | fields)
    assert model.num_parameters == 6_243_584_000  # ChatGLM2-6B and ChatGLM3-6B, as published
    assert (model.num_layers, model.num_kv_heads, model.head_dim) == (28, 2, 128)
    assert (
        ModelShape.from_config(
            {"model_type": "chatglm", **fields, "multi_query_attention": False}
        ).num_kv_heads
        == 32
    )


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # BLOOM-560M and OPT-350M, whose embedding is narrower than the hidden size.
        (dict(model_type="bloom", n_embed=1024, n_layer=24, num_attention_heads=16, n_inner=None,
              seq_length=2048, vocab_size=250880), 559_214_592),
        (dict(model_type="opt", hidden_size=1024, word_embed_proj_dim=512, num_hidden_layers=24,
              num_attention_heads=16, ffn_dim=4096, vocab_size=50272, max_position_embeddings=2048,
              do_layer_norm_before=False), 331_196_416),
    ],
)  # fmt: skip
def test_fields_that_only_one_class_has_are_read(config, parameters):
    model = ModelShape.from_config(config)
    assert model.num_parameters == pytest.approx(parameters, rel=1e-5)
    assert model.max_context == 2048


def test_the_number_of_experts_may_have_the_name_of_a_newer_transformers():
    older = CASES["Qwen/Qwen3-30B-A3B"]["config"] | {"num_experts": 160}
    newer = {name: value for name, value in older.items() if name != "num_experts"}
    found = [ModelShape.from_config(one) for one in (older, newer | {"num_local_experts": 160})]
    assert found[0].num_parameters == found[1].num_parameters


def test_active_parameters_have_the_output_projection_once():
    model = ModelShape.from_config(CASES["meta-llama/Meta-Llama-3.1-8B"]["config"])
    assert model.num_parameters - model.active_parameters == 128256 * 4096
    assert (
        round(ModelShape.from_config(CASES["Qwen/Qwen3-30B-A3B"]["config"]).active_parameters / 1e9, 1) == 3.0
    )


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_oss"])
def test_fields_that_published_configs_leave_out_have_the_defaults_of_their_class(kind):
    sizes = dict(hidden_size=4096, num_hidden_layers=2, num_attention_heads=32, intermediate_size=64)
    model, whole = ModelShape.from_config({"model_type": kind} | sizes), nested(kind, sizes)
    assert (model.vocab_size, model.head_dim, model.num_kv_heads) == (
        whole.vocab_size,
        whole.head_dim,
        whole.num_kv_heads,
    )
    with pytest.raises(ValueError, match="field 'hidden_size' is missing"):
        ModelShape.from_config({"model_type": kind})


def test_states_of_fixed_size_are_counted_apart_from_k_and_v():
    model = ModelShape.from_config(CASES["qwen3_next"]["config"])
    assert model.num_layers == 12
    one, two = (plan(model, "H100", concurrency=n) for n in (1, 2))
    # Of 36 layers: 32 matrices of 128 x 128, and 4 inputs of 8,192 channels, in float32.
    assert one.states == 36 * (32 * 128 * 128 + 4 * 8192) * 4 == two.states / 2
    assert (
        one.needed == one.weights + one.kv.reserved + one.states + one.tables + one.activations + one.overhead
    )


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"use_sliding_window": True, "sliding_window": 100}, {100}),
        ({"use_sliding_window": True, "sliding_window": None}, {None}),
        ({"use_sliding_window": False, "sliding_window": 100}, {None}),
    ],
    ids=str,
)
def test_qwen3_moe_has_its_window_in_all_layers(fields, windows):
    config = CASES["Qwen/Qwen3-30B-A3B"]["config"] | fields
    assert set(ModelShape.from_config(config).windows) == windows


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_configs_have_a_plan_or_one_clear_line(count):
    random_of = random.Random(count)
    whole = [case["config"] for case in CASES.values()]
    whole += [
        {"text_config": {"model_type": kind, **catalog.defaults()[kind], **changes}}
        for kind, changes, _ in CLASSES
    ]
    odd = [None, -1, 0, 1, 3, 2**70, 1e9, float("nan"), "x", "", [], {}, [1], {"a": 1}, True, False]
    for _ in range(count):
        config = copy.deepcopy(random_of.choice(whole))
        part = random_of.choice([config, *(v for v in config.values() if isinstance(v, dict) and v)])
        for name in random_of.sample(list(part), min(len(part), 2)):
            if random_of.random() < 0.25:
                del part[name]
            else:
                part[name] = random_of.choice(odd)
        try:
            plan(ModelShape.from_config(config), "H100")
        except ValueError as error:
            assert "\n" not in str(error)


# What `transformers` 5.23 makes of a class's defaults: number of weights of the encoder and its projector.
ENCODERS = [
    (
        "llava",
        4096,
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "image_size": 336,
            "patch_size": 14,
        },
        324487168,
    ),
    ("mistral3", 5120, {"model_type": "pixtral", "image_size": 1540, "patch_size": 14}, 438958080),
    ("internvl", 4096, {"model_type": "internvl_vision"}, 337509376),
    ("gemma3", 2304, {"model_type": "siglip_vision_model"}, 94654464),
    ("qwen2_vl", 8192, {}, 675759104),
    ("qwen2_5_vl", 8192, {}, 3083025152),
    ("qwen3_vl", 4096, {}, 566949104),
    ("llama4", 5120, {}, 455178240),
    ("none", 1, {"model_type": "voxtral_encoder"}, 636968960),
    ("none", 1, {"model_type": "gemma4_vision"}, 167364608),
]


@pytest.mark.parametrize(("kind", "hidden", "part", "parameters"), ENCODERS)
def test_encoders_have_the_weights_of_the_classes_of_transformers(kind, hidden, part, parameters):
    assert encoder_weights({"model_type": kind, "vision_config": part}, hidden) == (parameters, ())


def test_an_encoder_that_is_not_known_is_left_out_with_a_note():
    outer = {"text_config": CASES["qwen3-4b"]["config"], "vision_config": {"model_type": "dino"}}
    model = ModelShape.from_config(outer)
    assert model.num_parameters == ModelShape.from_config(CASES["qwen3-4b"]["config"]).num_parameters
    assert "the weights of vision_config 'dino' are not counted" in model.notes
