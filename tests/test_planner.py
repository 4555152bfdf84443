"""What memory a model takes, held to published numbers and to what `init` allocates."""

import dataclasses
import json
from math import prod

import jax
import jax.numpy as jnp
import pytest

import jaxkv
from jaxkv import CacheConfig, catalog, sizing
from jaxkv.planner import (
    Device,
    ModelShape,
    cache_config,
    choose_page_size,
    kv_cache_bytes,
    plan,
    suggestions,
)
from jaxkv.planner.page_size import CANDIDATES

MIB, GIB = 2**20, 2**30

# Of 8,192 tokens in bfloat16: exact, and reserved, in MiB; parameters as published. With windows, reserved is
# the pages of the groups and of a prefill chunk of 512 tokens (32 pages more in each group with a window).
MODELS = {
    "deepseek-v2-lite": (243, 243, 15.7e9),
    "deepseek-v3": (549, 549, 671e9),
    "gemma-2-9b": (2016, (512 + 257 + 32) * 21 / 8, 9.24e9),
    "gemma-3-1b": (43, (512 + 6 * (33 + 32)) / 16, 1.0e9),
    "gpt-oss-20b": (195, (512 + 9 + 32) * 12 / 32, 20.9e9),
    "llama-2-13b": (6400, 6400, 13.02e9),
    "llama-2-70b": (2560, 2560, 68.98e9),
    "llama-2-7b": (4096, 4096, 6.74e9),
    "llama-3.1-70b": (2560, 2560, 70.55e9),
    "llama-3.1-8b": (1024, 1024, 8.03e9),
    "mistral-7b-v0.1": (512, (257 + 32) * 2, 7.24e9),
    "mistral-7b-v0.3": (1024, 1024, 7.25e9),
    "qwen2-0.5b": (96, 96, 494e6),
    "qwen2.5-14b": (1536, 1536, 14.77e9),
    "smollm2-135m": (180, 180, 134.5e6),
    "tinyllama-1.1b": (176, 176, 1.10e9),
}
# Of the modules that `transformers` builds from these configs.
PARAMETERS = {
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "gpt-oss-20b": 20_914_757_184,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-14b": 14_770_033_664,
    "smollm2-135m": 134_515_008,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}


def shape(**fields) -> ModelShape:
    """Of a small Llama with some fields changed; None takes one out."""
    return ModelShape.from_config({k: v for k, v in (LLAMA | fields).items() if v is not None})


@pytest.mark.parametrize("name", catalog.names("models"))
def test_known_models_take_the_published_memory(name):
    exact, reserved, parameters = MODELS[name]
    model = ModelShape.from_config(name)
    counted = kv_cache_bytes(model, 8192, kv_dtype="bf16")
    assert counted.exact == exact * MIB
    assert counted.reserved == reserved * MIB
    assert counted.exact <= counted.paged <= counted.reserved
    assert model.num_parameters == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_counted_to_the_last_one(name):
    assert ModelShape.from_config(name).num_parameters == PARAMETERS[name]


def test_figures_that_people_quote():
    assert kv_cache_bytes(ModelShape.from_config("qwen2-0.5b"), 2048).exact == 25_165_824
    assert kv_cache_bytes(ModelShape.from_config("llama-3.1-8b"), 4096).exact == 536_870_912
    llama = ModelShape.from_config("llama-2-7b")
    assert kv_cache_bytes(llama, 4096).exact == 2 * GIB
    in_bytes = kv_cache_bytes(llama, 4096, kv_dtype="fp8")
    assert (in_bytes.exact, in_bytes.scales) == (GIB, 32 * MIB)
    assert kv_cache_bytes(llama, 4096, kv_dtype="int4").exact == GIB // 2


def test_pages_round_up_each_sequence_and_fragmentation_is_a_factor_of_its_own():
    counted = kv_cache_bytes(shape(), 17, 3, kv_dtype="f32", page_size=16)
    token = 2 * 2 * 16 * 4
    assert counted.exact == 3 * 2 * 17 * token
    assert counted.paged == 3 * 2 * 32 * token
    for model in (shape(), shape(model_type="mistral", sliding_window=4)):
        one, more = (kv_cache_bytes(model, 17, 3, kv_dtype="f32", fragmentation=f) for f in (1, 1.5))
        assert (more.paged, more.reserved) == (1.5 * one.paged, 1.5 * one.reserved)


def test_a_window_may_begin_in_the_middle_of_a_page():
    model = shape(model_type="mistral", sliding_window=10)
    counted = kv_cache_bytes(model, 100, kv_dtype="f32", page_size=8)
    # Ten tokens lie on three pages of eight at worst: 1 + 8 + 1.
    assert counted.paged == 2 * 3 * 8 * (2 * 2 * 16 * 4)
    assert kv_cache_bytes(model, 8, kv_dtype="f32", page_size=8).paged == 2 * 8 * (2 * 2 * 16 * 4)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 8}, (None,) * 4),
        ({"model_type": "mistral", "sliding_window": 8}, (8,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "mistral"}, (4096,) * 4),
        (
            {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"] * 2},
            (None, 4096) * 2,
        ),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, (None,) * 4),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 8),
        ),
        ({"model_type": "gemma2", "sliding_window": 8}, (8, None, 8, None)),
        ({"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 3}, (8, 8, None, 8)),
        (
            {
                "model_type": "gemma3_text",
                "sliding_window": 8,
                "layer_types": ["full_attention", *["sliding_attention"] * 3],
            },
            (None, 8, 8, 8),
        ),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_windows_are_those_of_the_architecture(fields, windows):
    assert ModelShape.from_config(LLAMA | {"num_hidden_layers": 4} | fields).windows == windows


@pytest.mark.parametrize(
    ("model_type", "heads", "head_dim", "windows"),
    [
        ("llama", 32, 4, (None, None)),
        ("mistral", 8, 4, (4096, 4096)),
        ("mixtral", 8, 4, (None, None)),
        ("qwen2", 32, 4, (None, None)),
        ("qwen3", 32, 128, (None, None)),
        ("gemma", 16, 256, (None, None)),
        ("gemma2", 4, 256, (4096, None)),
        ("gemma3_text", 4, 256, (4096, 4096)),
        ("gpt_oss", 8, 64, (128, None)),
    ],
)
def test_fields_that_are_absent_have_the_defaults_of_the_architecture(model_type, heads, head_dim, windows):
    model = shape(
        model_type=model_type,
        hidden_size=128,
        num_attention_heads=32,
        num_key_value_heads=None,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    assert (model.num_kv_heads, model.head_dim, model.windows) == (heads, head_dim, windows)


def test_windows_of_layer_types_need_a_window_and_may_have_older_names():
    kinds = ["attention", "sliding_attention"]
    assert shape(model_type="mistral", sliding_window=8, layer_types=kinds).windows == (None, 8)
    null = LLAMA | {"model_type": "mistral", "sliding_window": None, "layer_types": kinds}
    with pytest.raises(ValueError, match="field 'sliding_window' is missing"):
        ModelShape.from_config(null)


def test_the_type_of_what_holds_a_text_model_and_a_dtype_are_shown_in_short():
    nested = ModelShape.from_config({"model_type": {"a": "b" * 999}, "text_config": LLAMA})
    assert len(nested.notes[0]) < 120
    with pytest.raises(ValueError, match=r"dtype an integer of .* bits is not known"):
        shape(dtype=10**5000)


def test_traps_of_published_configs():
    assert shape(num_key_value_heads=None).num_kv_heads == 4
    assert shape(head_dim=32).head_dim == 32
    assert shape(dtype="float16").dtype == "float16"
    assert shape(torch_dtype="torch.bfloat16").dtype == "bfloat16"
    nested = ModelShape.from_config({"model_type": "gemma3", "text_config": LLAMA, "torch_dtype": "float16"})
    assert (nested.architecture, nested.dtype) == ("llama", "float16")
    assert "text part" in nested.notes[0]
    gpt2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
    assert ModelShape.from_config(gpt2 | {"vocab_size": 50257}).num_parameters == 124_439_808
    falcon = {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32}
    falcon |= {"multi_query": True, "vocab_size": 65024}
    assert ModelShape.from_config(falcon).num_kv_heads == 1
    assert ModelShape.from_config(falcon).num_parameters == 6_921_720_704
    assert ModelShape.from_config("gpt-oss-20b").has_sinks


def test_mla_keeps_a_latent_vector_whatever_the_config_says_of_heads():
    model = ModelShape.from_config("deepseek-v3")
    assert (model.elements_per_token, model.is_latent) == (576, True)
    # It cannot be split over devices: each keeps all of it.
    assert plan(model, "H200", tensor_parallel=16).kv == plan(model, "H200").kv
    made = plan(model, "H200")
    assert (made.cache_config, made.pages) == (None, 512)
    raw = json.loads(catalog.find("models", "deepseek-v2-lite").read_text())
    assert ModelShape.from_config(raw | {"num_key_value_heads": 3}).elements_per_token == 576


def test_heads_are_shared_as_devices_really_need_them():
    model = ModelShape.from_config("qwen2.5-14b")  # 40 query heads on 8 KV heads
    heads = {
        devices: plan(model, "H100", tensor_parallel=devices).kv_heads_per_device for devices in (1, 2, 4, 8)
    }
    assert heads == {1: 8, 2: 4, 4: 2, 8: 1}
    # Five devices of eight query heads: the second's, 8 to 15, read KV heads 1, 2 and 3.
    assert plan(model, "H100", tensor_parallel=5).kv_heads_per_device == 3
    assert plan(model, "H100", tensor_parallel=20).kv_heads_per_device == 2
    assert plan(model, "H100", tensor_parallel=40).kv_heads_per_device == 1


def test_what_formats_keep_in_16_bits_is_counted_so():
    model = ModelShape.from_config("llama-3.1-8b")
    embeddings = 2 * 128256 * 4096
    assert model.embedding_parameters == embeddings
    rest = model.num_parameters - embeddings
    assert plan(model, "H100", weights_dtype="int4").weights == embeddings * 2 + round(rest * 4.25 / 8)
    assert plan(model, "H100", weights_dtype="f32").weights == 4 * model.num_parameters
    experts = ModelShape.from_config("gpt-oss-20b")
    # As published: 13.76 GB.
    assert plan(experts, "H100").weights == pytest.approx(13.76e9, rel=0.01)


def test_decode_reads_what_a_step_meets():
    llama = plan(ModelShape.from_config("llama-3.1-8b"), "H100")
    read = 2 * (llama.shape.num_parameters - 128256 * 4096) + llama.kv.exact
    assert llama.decode_tokens_per_second == pytest.approx(3352e9 / read)
    one, many = (plan(ModelShape.from_config("gpt-oss-20b"), "H100", concurrency=n) for n in (1, 64))
    # Many sequences meet all experts, and share the reading.
    assert one.decode_tokens_per_second < many.decode_tokens_per_second < 64 * one.decode_tokens_per_second
    assert plan(llama.shape, "80GiB").decode_tokens_per_second is None


def test_a_config_may_be_a_file_a_folder_or_an_object(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    class Config:
        def to_dict(self):
            return LLAMA

    shapes = [
        ModelShape.from_config(source) for source in (tmp_path, tmp_path / "config.json", Config(), LLAMA)
    ]
    assert len({dataclasses.replace(model, name="") for model in shapes}) == 1
    assert shapes[0].name == tmp_path.name


def test_weights_beside_a_config_are_counted_as_they_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    half = shape().num_parameters * 2
    (tmp_path / "model.safetensors").write_bytes(bytes(half))
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(half))
    assert plan(ModelShape.from_config(tmp_path), GIB).weights == half
    # A file of another name may be another model's.
    (tmp_path / "other.json").write_text(json.dumps(LLAMA))
    assert ModelShape.from_config(tmp_path / "other.json").stored_bytes is None
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": half + 7}}))
    made = plan(ModelShape.from_config(tmp_path), GIB)
    assert (made.weights, made.weights_dtype) == (half, "stored"), "the whole file wins, as it is loaded"
    (tmp_path / "model.safetensors").unlink()
    made = plan(ModelShape.from_config(tmp_path), GIB)
    assert (made.weights, made.weights_dtype) == (half + 7, "stored")
    assert plan(made.shape, GIB, weights_dtype="f32").weights == 4 * made.shape.num_parameters


def test_weights_that_are_not_all_there_are_not_counted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(100_000))
    assert ModelShape.from_config(tmp_path).stored_bytes is None
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(100_000))
    assert ModelShape.from_config(tmp_path).stored_bytes == 200_000
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(10**6))
    with pytest.raises(ValueError, match=r"files of .* do not hold .* parameters"):
        plan(ModelShape.from_config(tmp_path), GIB)


@pytest.mark.parametrize("metadata", [{}, None, {"mergekit_version": "0.0.4"}])
def test_files_of_an_index_without_a_size_are_counted_if_they_are_all_there(tmp_path, metadata):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    names = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    index = json.dumps({"metadata": metadata, "weight_map": names})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    for name, size in (("one", 30_000), ("two", 50_000)):
        assert ModelShape.from_config(tmp_path).stored_bytes is None
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size))
    assert ModelShape.from_config(tmp_path).stored_bytes == 80_000


@pytest.mark.parametrize(
    "metadata", ["[1]", "3", '{"total_size": 1e400}', '{"total_size": NaN}', '{"total_size": "7"}']
)
def test_a_damaged_index_is_refused(tmp_path, metadata):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"metadata": {metadata}}}')
    with pytest.raises(ValueError, match=r"total_size must be a positive number"):
        ModelShape.from_config(tmp_path)


def test_quantized_checkpoints_that_are_not_known_are_refused():
    awq = shape(quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match="weights in 'awq' is not known; say how with weights_dtype"):
        plan(awq, GIB)
    assert plan(awq, GIB, weights_dtype="int4").fits
    with pytest.raises(ValueError, match="mxfp4"):
        plan(shape(quantization_config={"quant_method": "mxfp4"}), GIB)


@pytest.mark.parametrize("field", ["quantization", "quantization_config"])
def test_weights_quantized_without_a_method_are_counted_with_their_groups_scales(field):
    mlx = shape(**{field: {"group_size": 64, "bits": 4}})
    assert plan(mlx, GIB).weights == -(-round(mlx.num_parameters * (4 + 32 / 64)) // 8)
    # Where layers differ, or the bits are not said, only the user can say.
    for options in ({"bits": 4}, {}, {"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 8}}):
        unsaid = shape(**{field: options})
        with pytest.raises(ValueError, match="say how with weights_dtype"):
            plan(unsaid, GIB)
        assert plan(unsaid, GIB, weights_dtype="int4").fits


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}, 64),
        ({"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 8}, 64),
    ],
    ids=str,
)
def test_the_context_counts_rotary_scaling_in_where_it_stretches(scaling, context):
    scaled = shape(max_position_embeddings=64, rope_scaling=scaling)
    assert scaled.max_context == context
    assert scaled.is_extended == (scaling.get("rope_type") not in ("llama3", "longrope"))
    assert shape(max_position_embeddings=64, rope_parameters=scaling).max_context == context


def test_more_experts_chosen_than_there_are_is_refused():
    experts = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 99}
    with pytest.raises(ValueError, match="num_experts_per_tok=99 is more than the 8"):
        shape(**experts)
    with pytest.raises(ValueError, match="mlp_only_layers must be a list of layers"):
        shape(
            model_type="qwen3_moe",
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            mlp_only_layers=3,
        )


def test_a_gguf_file_says_the_same_as_its_config():
    from jaxkv.models.loading import find_model

    model, known = ModelShape.from_config(find_model("smollm2-135m")), ModelShape.from_config("smollm2-135m")
    same = (
        "num_layers",
        "num_kv_heads",
        "head_dim",
        "windows",
        "num_parameters",
        "max_context",
        "vocab_size",
    )
    assert [getattr(model, name) for name in same] == [getattr(known, name) for name in same]
    assert plan(model, GIB).weights == find_model("smollm2-135m").stat().st_size


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "mamba"}, r"model_type 'mamba' is not known; known: .* and \d+ others"),
        ({"model_type": None}, "'model_type' is missing"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": None}, "field 'hidden_size' is missing"),
        ({"vocab_size": -1}, "vocab_size must be an integer from 1"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers must be an integer from 1 to 65536, not 1000000000",
        ),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
        ({"hidden_size": 65}, "hidden_size=65"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"torch_dtype": "float7"}, "dtype 'float7' is not known"),
        ({"layer_types": ["full_attention"]}, "layer_types must have an entry for each of 2 layers, not 1"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"quantization_config": 4}, "quantization_config must be an object, not 4"),
        ({"quantization_config": {"quant_method": 4}}, "quantization_config's quant_method must be a string"),
        (
            {"quantization": {"bits": 99, "group_size": 64}},
            "quantization: bits must be an integer from 1 to 8",
        ),
    ],
    ids=str,
)
def test_a_bad_config_is_refused_by_name(fields, complaint):
    with pytest.raises(ValueError, match=complaint.replace("[", r"\[")):
        shape(**fields)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 10**5], ids=repr)
def test_a_file_that_is_no_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: (is not JSON|must hold)"):
        ModelShape.from_config(tmp_path)


def test_an_unknown_name_says_which_are_known():
    with pytest.raises(ValueError, match=r"'llama-9' is not one of the known models: .*llama-2-7b"):
        ModelShape.from_config("llama-9")
    with pytest.raises(ValueError, match=r"'H900' is not one of the known devices: .*h100"):
        plan(shape(), "H900")


@pytest.mark.parametrize(
    "options",
    [
        {"context": 0},
        {"context": -5},
        {"context": 1.5},
        {"concurrency": 0},
        {"page_size": True},
        {"tensor_parallel": 3},
        {"memory_fraction": 0},
        {"memory_fraction": 1.1},
        {"kv_dtype": "float9"},
        {"kv_dtype": []},
        {"weights_dtype": []},
        {"weights_dtype": "int3"},
        {"fragmentation": 0.5},
    ],
    ids=str,
)
def test_a_number_out_of_range_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        _ = plan(shape(), GIB, **options).kv


def test_a_plan_adds_up():
    made = plan(ModelShape.from_config("llama-3.1-8b"), "H100", concurrency=4)
    assert made.needed == made.weights + made.kv.reserved + made.tables + made.activations + made.overhead
    assert made.usable - made.needed == made.headroom > 0
    assert made.weights == 2 * made.shape.num_parameters
    assert made.pages == 4 * 8192 // 16


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama-2-7b", dict(context=2048, concurrency=2)),
        ("gemma-3-1b", dict(context=128)),
        ("gemma-3-1b", dict(context=128, concurrency=3000)),
        ("llama-2-7b", dict(context=200_000)),
    ],
)
def test_the_largest_context_and_concurrency_fit_and_one_more_does_not(model, options):
    made = plan(ModelShape.from_config(model), "24GiB", **options)
    for name, largest in (("context", made.max_context), ("concurrency", made.max_concurrency)):
        assert not largest or dataclasses.replace(made, **{name: largest}).fits
        more = dataclasses.replace(made, **{name: largest + (made.page_size if name == "context" else 1)})
        assert not more.fits or largest == made.shape.max_context
    assert made.max_concurrency == int(made.max_concurrency_ratio)
    assert made.kv_capacity_tokens == int(made.max_concurrency_ratio * made.context)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "mistral-7b-v0.1", "gemma-3-1b", "gpt-oss-20b"])
def test_a_planned_cache_holds_the_planned_context(model):
    context = 2048 if model == "llama-3.1-8b" else 8192
    made = plan(ModelShape.from_config(model), "H100", context=context, concurrency=2)
    assert made.cache_config.max_context_length(2) == context
    assert made.needed > made.kv.reserved == made.cache_config.pool_bytes
    assert made.pages == made.cache_config.num_pages
    windows = any(made.shape.windows)
    assert any("layers with a window release their pages" in note for note in made.notes) == windows
    # K and V of one element; the groups, and so the pages, are those of the plan.
    small = dataclasses.replace(
        made.cache_config, num_kv_heads=1, head_dim=1, group_layers=made.layers_per_page
    )
    assert small.groups[-1].layers == made.groups[-1].layers
    cache, chunk = jaxkv.init(small), small.max_chunk
    allocate = jax.jit(jaxkv.allocate, static_argnames="total_tokens", donate_argnames="cache")
    # The second prompt is prefilled while the first sequence is decoded, until both have the whole context.
    first = context - context // chunk
    for start in range(0, first, chunk):
        counts = jnp.array([min(chunk, first - start), 0])
        cache, batch = allocate(cache, jnp.array([0, 1]), counts, total_tokens=chunk + 1)
        jaxkv.raise_for_status(batch)
    for _ in range(context // chunk):
        cache, batch = allocate(cache, jnp.array([0, 1]), jnp.array([1, chunk]), total_tokens=chunk + 1)
        jaxkv.raise_for_status(batch)
    assert cache.table.positions.tolist() == [context, context]


@pytest.mark.parametrize(
    ("model", "device", "options"),
    [
        ("llama-3.1-70b", "H100", {}),
        ("llama-2-13b", "RTX 4090", {"concurrency": 4}),
        ("llama-2-7b", "RTX 4090", {"context": 65536, "concurrency": 8}),
        ("deepseek-v3", "H100", {"tensor_parallel": 8}),
        ("llama-2-7b", "4GiB", {}),
        ("mistral-7b-v0.1", "16GiB", {"concurrency": 64}),
        ("smollm2-135m", "64MiB", {}),
        ("gemma-2-9b", "RTX 4090", {}),
        ("qwen2.5-14b", "16GiB", dict(tensor_parallel=4, context=32768, concurrency=5)),
        ("llama-3.1-70b", "L4", dict(context=131072, concurrency=64, kv_dtype="int8", weights_dtype="int4")),
    ],
)
def test_every_suggestion_does_what_it_says(model, device, options):
    refused = plan(ModelShape.from_config(model), device, **options)
    assert not refused.fits
    assert refused.risk == "does not fit"
    for suggestion in suggestions(refused):
        again = plan(refused.shape, device, **(options | suggestion.change))
        assert again == suggestion.plan
        assert again.fits
    changes = [suggestion.change for suggestion in suggestions(refused)]
    assert changes or model == "smollm2-135m"
    if (model, device) == ("llama-3.1-70b", "H100"):
        assert {"tensor_parallel": 2} in changes
    if model == "gemma-2-9b":
        assert {"weights_dtype": "bfloat16", "kv_dtype": "bfloat16"} in changes


def test_a_plan_that_fits_needs_no_suggestions():
    assert suggestions(plan(shape(), "H100")) == []


def allocated(config: CacheConfig) -> int:
    """Bytes of the arrays that `init` makes."""
    return sum(array.nbytes for array in jax.tree.leaves(jaxkv.init(config)))


@pytest.mark.parametrize("preset", ["small", "medium", "large"])
@pytest.mark.parametrize("options", [{}, {"quantization": "int4"}, {"page_size": 1}], ids=str)
def test_estimated_memory_is_what_init_allocates_for_presets_scaled_down(preset, options):
    config = sizing.from_preset(preset, memory="48MiB", max_context=64, max_seqs=4, **options)
    assert allocated(config) == config.estimated_memory_bytes() <= 48 * MIB
    one_more = dataclasses.replace(config, num_pages=config.num_pages + 1)
    assert one_more.estimated_memory_bytes() > 48 * MIB


@pytest.mark.parametrize("preset", ["small", "medium", "large"])
def test_presets_in_full_take_their_memory(preset):
    config = sizing.from_preset(preset)
    shapes = jax.eval_shape(lambda: jaxkv.init(config))
    assert (
        sum(prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        == config.estimated_memory_bytes()
    )
    memory = {"small": 4, "medium": 12, "large": 40}[preset] * 10**9
    assert memory - config.page_bytes - 8 < config.estimated_memory_bytes() <= memory


def test_the_small_preset_takes_what_its_name_says():
    assert sizing.from_preset("small").estimated_memory() == "3.72 GiB"


@pytest.mark.parametrize(
    "model", ["smollm2-135m", "gemma-3-1b", "gpt-oss-20b", "mistral-7b-v0.1", "qwen2-0.5b"]
)
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8", "fp8", "int4"])
def test_planned_bytes_are_those_that_init_allocates(model, kv_dtype):
    known = ModelShape.from_config(model)
    made = plan(known, "H100", context=300, concurrency=2, kv_dtype=kv_dtype, page_size=32)
    config = cache_config(known, 300, 2, kv_dtype=kv_dtype, page_size=32)
    assert made.cache_config == config
    assert allocated(config) == made.kv.reserved + made.tables


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4"])
def test_with_windows_too_and_pages_of_a_prefill_chunk(kv_dtype):
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    model = shape(model_type="gemma3_text", num_hidden_layers=6, sliding_window=24, layer_types=kinds)
    made = plan(model, "H100", context=1000, concurrency=3, kv_dtype=kv_dtype, page_size=8)
    assert len(made.groups) == 6
    # 24 tokens begin and end within a page; a chunk of 512 fills 64 more.
    assert made.pages == 3 * (125 + 5 * 4) + 5 * 64
    assert made.kv.paged < made.kv.reserved == made.cache_config.pool_bytes
    assert allocated(made.cache_config) == made.kv.reserved + made.tables


def test_where_jaxkv_has_no_cache_every_layer_keeps_the_whole_context():
    model = shape(model_type="mistral", sliding_window=10, head_dim=12)
    made = plan(model, "H100", context=100, kv_dtype="int4")
    assert (made.cache_config, made.groups, made.pages) == (None, (), 7)
    assert made.kv.reserved == 7 * made.kv.paged / 2 and made.notes == ()


def test_a_plan_of_more_pages_than_a_pool_has_is_refused():
    model = shape(model_type="gemma3_text", num_hidden_layers=6, sliding_window=2**19)
    made = plan(model, "100TiB", context=2**19, concurrency=2)
    assert (made.max_context, made.max_concurrency) == (256, 341)
    with pytest.raises(ValueError, match=r"context x concurrency takes .* token slots; a pool has fewer"):
        plan(model, "100TiB", context=2**19, concurrency=2000)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "medium"])
def test_a_preset_fits_here_and_allocates_what_was_planned(preset):
    config = sizing.from_preset(preset)
    assert allocated(config) == config.estimated_memory_bytes()


def test_a_config_for_a_context_length():
    sizes = dict(num_layers=2, num_kv_heads=2, head_dim=8, max_seqs=4)
    config = sizing.for_context_length(100, **sizes)
    assert (config.num_pages, config.max_pages_per_seq) == (28, 7)
    assert config.max_context_length() == 112
    assert dataclasses.replace(config, num_pages=14).max_context_length(concurrency=4) == 48
    windows = sizing.for_context_length(1000, **sizes, layer_windows=(16, None))
    assert (windows.max_pages_per_seq, windows.max_context_length(4)) == (63, 1008)
    # A window of 16 lies on two pages; a chunk of 512 tokens fills 32 more, of one sequence at a time.
    assert windows.num_pages == 4 * (63 + 2) + 32
    with pytest.raises(ValueError, match="concurrency=5 is more than max_seqs=4"):
        config.max_context_length(5)
    with pytest.raises(ValueError, match=r"memory=1\.00 KiB does not hold one sequence of 100 tokens"):
        sizing.for_context_length(100, memory=1024, **sizes)
    with pytest.raises(ValueError, match="context=0"):
        sizing.for_context_length(0, **sizes)


def test_the_custom_preset_says_what_it_leaves_open():
    with pytest.raises(
        ValueError, match="does not set max_context, num_layers, num_kv_heads, head_dim, memory;"
    ):
        sizing.from_preset("custom")
    with pytest.raises(
        ValueError, match="'huge' is not one of the known presets: custom, large, medium, small"
    ):
        sizing.from_preset("huge")
    sizes = dict(max_context=64, num_layers=1, num_kv_heads=1, head_dim=8)
    assert sizing.from_preset("custom", memory="1MiB", **sizes).page_size == 16


@pytest.mark.parametrize("device", catalog.names("devices"))
def test_devices_have_memory_and_bandwidth(device):
    known = Device.named(device)
    assert 20 * GIB < known.memory < 300 * GIB
    assert 2e11 < known.bandwidth < 1e13


def test_page_sizes_are_chosen_by_rule_and_checked_against_the_count():
    assert choose_page_size([500]).page_size == 16
    assert choose_page_size([2048]).page_size == 32
    assert choose_page_size([8192]).page_size == 64
    assert choose_page_size([50_000]).page_size == 128
    # One token past a page leaves most of the next one empty.
    short = choose_page_size([17] * 10)
    assert (short.page_size, "16 by rule, 46.9% empty" in short.reason) == (8, True)
    costs = {cost.page_size: cost for cost in choose_page_size([100, 200]).costs}
    assert set(costs) == set(CANDIDATES)
    assert costs[16].pages == (7 + 13) / 2
    assert costs[16].wasted_tokens == (12 + 8) / 2
    with pytest.raises(ValueError, match="lengths is empty"):
        choose_page_size([])
