"""Every family gives PyTorch's logits through the paged cache, and refuses what it does not build."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxkv
from jaxkv.errors import ModelLoadError
from jaxkv.models import ModelConfig, dense_logits, load
from jaxkv.models.families.reading import rope_scaling
from jaxkv.models.families.registry import FAMILIES
from jaxkv.planner import ModelShape
from jaxkv.rope import LinearScaling, Rope, YarnScaling
from tests.models import gguf_files

FIXTURES = Path(__file__).parents[1] / "fixtures" / "families"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

# Dynamic scaling beyond the model's own context takes the frequencies of the text's length.
CONTEXTS = {"falcon3": 40}
EXPERTS = {"expert_count": 4, "expert_used_count": 2}
FACTORS = {
    "embedding_scale": 3.0,
    "residual_scale": 0.5,
    "attention.scale": 0.25,
    "logit_scale": 2.0,
}
# What a GGUF file's header says beyond the sizes that all have.
HEADERS = {
    "qwen3": {},
    "olmo2": {},
    "smollm3": {},
    "seed_oss": {},
    "phi3": {"attention.sliding_window": 7},
    "phi4_mini": {"rope.scaling.original_context_length": 24, "attention.sliding_window": 0},
    "exaone4": {
        "attention.sliding_window": 7,
        "attention.sliding_window_pattern": [True, False, True],
    },
    "olmo3": {
        "attention.sliding_window": 7,
        "attention.sliding_window_pattern": [True, False, True],
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
    },
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"expert_feed_forward_length": 12},
    "gpt_oss": EXPERTS
    | {
        "expert_feed_forward_length": 32,
        "attention.sliding_window": 7,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_beta_fast": 4.0,
    },
    "cohere2": {
        "attention.layer_norm_epsilon": 1e-5,
        "attention.sliding_window": 7,
        "attention.sliding_window_pattern": 2,
        "logit_scale": 0.25,
    },
    "glm4": {},
    "starcoder2": {"attention.layer_norm_epsilon": 1e-5, "attention.sliding_window": 7},
    "ernie4_5": {},
    "granite": FACTORS,
    "granite_moe": EXPERTS | FACTORS,
    "gemma2": {
        "attention.sliding_window": 7,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3": {
        "attention.sliding_window": 7,
        "attention.sliding_window_pattern": 2,
        "rope.freq_base_swa": 100.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
    },
}


def saved(name):
    with np.load(FIXTURES / name / "logits.npz") as file:
        return file["tokens"], file["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_twenty_steps_past_every_window_give_pytorchs_logits(name):
    loaded, (tokens, logits) = load(FIXTURES / name, max_context=CONTEXTS.get(name)), saved(name)
    seqs, prompt, chunk = jnp.asarray([1, 0]), 20, 5
    sizes = dict(num_pages=96, page_size=4, max_pages_per_seq=24, max_seqs=2)
    cache = jaxkv.init(loaded.config.cache_config(**sizes, dtype="float32"))

    @jax.jit
    def step(model, cache, ids, count):
        """One program for all: the prompt in chunks, then single tokens beside padding."""
        cache, batch = jaxkv.allocate(cache, seqs, jnp.full(2, count), total_tokens=2 * chunk)
        return model(ids, cache, batch)

    def run(start, count):
        ids = np.full(2 * chunk, 95, np.int32)
        ids[: 2 * count] = tokens[:, start : start + count].reshape(-1)
        got, after = step(loaded.model, cache, jnp.asarray(ids), jnp.asarray(count, jnp.int32))
        return np.asarray(got[: 2 * count]).reshape(2, count, -1), after

    for at, count in [(at, chunk) for at in range(0, prompt, chunk)] + [(at, 1) for at in range(prompt, 40)]:
        got, cache = run(at, count)
        np.testing.assert_allclose(got, logits[:, at : at + count], **CLOSE)


@pytest.mark.parametrize("name", sorted(HEADERS))
def test_a_gguf_file_gives_pytorchs_logits(name, tmp_path):
    raw = json.loads((FIXTURES / name / "config.json").read_text())
    architecture = gguf_files.architecture_of(raw)
    header = {f"{architecture}.{field}": value for field, value in HEADERS[name].items()}
    settings = raw["rope_parameters"]
    for kind in ("long", "short"):
        if f"{kind}_factor" in settings:
            header[f"rope_factors_{kind}.weight"] = np.asarray(settings[f"{kind}_factor"], np.float32)
            factor = ModelConfig.from_hf(raw).rope.magnitude
            header[f"{architecture}.rope.scaling.attn_factor"] = factor
    path = gguf_files.write_checkpoint(tmp_path / "m.gguf", FIXTURES / name, replace=header)
    tokens, logits = saved(name)
    loaded = load(path)
    got = jax.jit(dense_logits)(loaded.model, jnp.asarray(tokens), jnp.full(2, 40))
    np.testing.assert_allclose(got, logits, **CLOSE)
    assert loaded.config.windows == ModelConfig.from_hf(FIXTURES / name).windows
    planned, known = ModelShape.from_config(path), ModelShape.from_config(raw)
    for field in ("num_layers", "num_kv_heads", "head_dim", "windows", "num_parameters"):
        assert getattr(planned, field) == getattr(known, field), field


def test_a_gguf_file_of_llama_may_have_biases(tmp_path):
    folder = shutil.copytree(FIXTURES / "falcon3", tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text()) | {"rope_parameters": {"rope_theta": 1000.0}}
    (folder / "config.json").write_text(json.dumps(raw))
    file, tokens = gguf_files.write_checkpoint(tmp_path / "m.gguf", folder), jnp.arange(24).reshape(2, 12)
    got, wanted = (dense_logits(load(path).model, tokens, jnp.full(2, 12)) for path in (file, folder))
    np.testing.assert_allclose(got, wanted, **CLOSE)


def test_every_family_has_a_model_type_of_its_own():
    kinds = [kind for family in FAMILIES for kind in (*family.model_types, *family.wrappers)]
    assert len(kinds) == len(set(kinds))


def config(name, **change):
    return ModelConfig.from_hf(json.loads((FIXTURES / name / "config.json").read_text()) | change)


def test_an_older_gemma3_config_is_read_alike():
    older = {"layer_types": None, "rope_parameters": None, "sliding_window_pattern": 2}
    older |= {"rope_theta": 50000.0, "rope_local_base_freq": 100.0}
    older |= {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert config("gemma3", **older) == config("gemma3")


@pytest.mark.parametrize("name", ["gemma3", "olmo3"])
def test_rope_scaling_beside_settings_of_each_kind_of_layer_is_of_full_attention(name):
    both = config(name, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert both == dataclasses.replace(
        config(name), rope_scaling=LinearScaling(factor=2.0), max_context=both.max_context
    )


@pytest.mark.parametrize("name", ["phi3", "mixtral", "starcoder2"])
def test_a_window_of_every_layer_is_so_whatever_layer_types_say(name):
    raw = config(name, sliding_window=7)
    full = ["full_attention"] * raw.num_layers
    assert config(name, sliding_window=7, layer_types=full).windows == raw.windows == (7,) * raw.num_layers


def test_gemma3_rotates_layers_with_a_window_by_a_base_of_their_own():
    got = config("gemma3")
    assert got.windows == (7, None, 7) and got.rope is None
    assert (got.rope_theta, got.window_rope_theta) == (50000.0, 100.0)
    assert got.rope_scaling == LinearScaling(factor=4.0)
    assert got.ropes[0] == got.ropes[2] != got.ropes[1]


def test_layers_without_rotary_positions_are_those_of_the_config():
    assert config("smollm3").no_rope_layers == config("smollm3", no_rope_layers=None).no_rope_layers == (3,)
    assert config("exaone4").no_rope_layers == (1,)
    whole = config("exaone4", sliding_window=None, layer_types=None)
    assert (whole.no_rope_layers, whole.windows) == ((), (None,) * 3)


def test_exaone_names_the_layers_of_a_period_by_letters():
    whole = config("exaone4", num_hidden_layers=8, layer_types=None)
    assert whole.windows == (7, 7, 7, None) * 2
    assert config("exaone4", num_hidden_layers=8, layer_types=None, sliding_window_pattern="LLLG") == whole
    # Published configs say both.
    assert config("exaone4", sliding_window_pattern="LLLG") == config("exaone4")


def test_dynamic_scaling_changes_nothing_within_the_models_own_context():
    whole, plain = config("falcon3"), config("falcon3", rope_parameters={"rope_theta": 1000.0})
    assert (whole.max_context, whole.rope) == (32, plain.rope)
    assert whole.for_context(33).rope != plain.rope
    with pytest.raises(ValueError, match="max_context must be an integer from 1 to 40, not 41"):
        whole.for_context(41)


def test_longrope_takes_the_short_factors_if_no_context_exceeds_the_original_one():
    longest, short = config("phi4_mini"), config("phi4_mini").for_context(24)
    assert longest.max_context == 128 and longest.rope != short.rope
    assert load(FIXTURES / "phi4_mini", max_context=24).model.blocks[0].rope == short.rope
    with pytest.raises(ValueError, match="max_context must be an integer from 1 to 128, not 129"):
        load(FIXTURES / "phi4_mini", max_context=129)


@pytest.mark.parametrize("row", json.loads((FIXTURES.parent / "rotary.json").read_text()))
def test_scaled_frequencies_are_those_of_transformers(row):
    settings = row["settings"]
    scaling = rope_scaling({"rope_parameters": settings}, settings, row["positions"])
    features = int(8 * settings.get("partial_rotary_factor", 1.0))
    rope = Rope.of(features, settings["rope_theta"], scaling, max_context=row["length"])
    np.testing.assert_allclose(rope.frequencies, row["frequencies"], rtol=1e-6)
    assert rope.magnitude == pytest.approx(row["magnitude"], rel=1e-6)


def test_gpt_oss_without_rotary_settings_has_those_of_the_published_models():
    got = config("gpt_oss", rope_parameters=None)
    assert got.rope_scaling == YarnScaling(
        factor=32.0, original_max_position=4096, truncate=False, magnitude=got.rope.magnitude
    )
    assert (got.rope_theta, got.windows) == (150000.0, (7, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_scales": None}, "down_proj_scales' is missing"),
        ({"_blocks": None}, "down_proj' is missing"),
        ({"_scales": np.zeros((4, 32, 2), np.uint8)}, "shape (4, 32, 1, 16), expected 16 bytes for each"),
        ({"_scales": np.zeros((4, 32, 1), np.float32)}, "scales are float32"),
        ({"_scales": np.full((4, 32, 1), 255, np.uint8)}, "holds NaN or infinite values"),
    ],
)
def test_damaged_mxfp4_weights_are_named(change, message, tmp_path):
    folder = shutil.copytree(FIXTURES / "gpt_oss_mxfp4", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    changed = tensors | {name + part: tensor for part, tensor in change.items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ModelLoadError) as raised:
        load(folder)
    assert name in str(raised.value) and message in str(raised.value)


def test_bytes_are_no_weights(tmp_path):
    folder = shutil.copytree(FIXTURES / "falcon3", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(24, np.uint8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"'model\.norm\.weight' holds uint8, not weights"):
        load(folder)


def test_a_nested_config_is_its_text_part():
    nested = json.loads((FIXTURES / "gemma3_nested" / "config.json").read_text())
    assert ModelConfig.from_hf(nested) == ModelConfig.from_hf(nested["text_config"])
    with pytest.raises(ValueError, match="quantization_config"):
        ModelConfig.from_hf(nested | {"quantization_config": {"quant_method": "gptq"}})
    softcapped = nested["text_config"] | {"final_logit_softcapping": 30.0}
    assert ModelConfig.from_hf(softcapped).logit_softcap == 30.0
    with pytest.raises(ValueError, match=r"final_logit_softcapping 30\.0 is not supported in a gemma3"):
        ModelConfig.from_hf(nested | {"text_config": softcapped})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not"),
        ("gemma3", {"hidden_activation": "relu"}, "hidden_activation 'relu' is not supported"),
        ("gemma3", {"attention_bias": True}, "attention_bias True is not supported"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0 is not supported"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be positive, not 0.0"),
        ("gemma3", {"final_logit_softcapping": -1.0}, "logit_softcap must be a positive number, not -1.0"),
        ("gemma3", {"sliding_window": None}, "layer_types has sliding_attention, but sliding_window is null"),
        ("gemma3", {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}}},
         "sliding_attention: 'yarn' is not supported"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e6}}, "'rope_theta' is of neither"),
        ("olmo3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'rope_type' is of neither"),
        ("olmo3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
         "rope_scaling must name its type as rope_type, not as type 'linear'"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types 'chunked_attention' is not"),
        ("exaone4", {"sliding_window_pattern": "LLX", "layer_types": None},
         "sliding_window_pattern must be an integer, or letters L and G, not 'LLX'"),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be positive, not 0.0"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must be a list of 4 times 0 or 1"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ("phi3", {"rope_parameters": {"rope_type": "ntk"}}, "rope_scaling 'ntk' is not supported"),
        ("phi4_mini", {"rope_parameters": {"rope_type": "longrope", "short_factor": 2.0}},
         "short_factor must be a list of numbers, not 2.0"),
        ("phi4_mini", {"rope_parameters": {"rope_type": "su", "short_factor": [1.0], "long_factor": [2.0]}},
         "rope_scaling needs 4 short_factors, not 1"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "must make an even part of 8 features"),
        ("olmo2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias True is not supported"),
        ("ernie4_5", {"use_bias": True}, "use_bias True is not supported"),
        ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config {'quant_method'"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit must be a positive number, not 0.0"),
        ("cohere2", {"sliding_window": None}, "has sliding_attention, but sliding_window is null"),
        ("cohere2", {"use_qk_norm": True}, "use_qk_norm True is not supported"),
        ("starcoder2", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("falcon3", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config {'quant"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers must be a list of integers, not 'all'"),
        ("qwen2_moe", {"num_experts_per_tok": 5}, "experts' per_token must be an integer from 1 to 4"),
        ("mixtral", {"layer_types": ["sliding_attention"] * 2}, "layer_types 'sliding_attention' is not"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ("olmo3", {"rope_theta": 1e6}, "rope_theta 1000000.0 is not supported; supported: 500000.0"),
        ("phi3", {"layer_types": MIXED}, "layer_types 'sliding_attention' is not supported"),
    ],
)  # fmt: skip
def test_what_a_family_does_not_build_is_refused_by_name(name, change, message):
    with pytest.raises(ValueError) as raised:
        config(name, **change)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": "between"}, "norms must be 'before' or 'around' or 'after', not 'between'"),
        ({"qk_norm": "each"}, "qk_norm must be 'heads' or 'all' or None, not 'each'"),
        ({"activation": "relu"}, "activation must be 'silu' or 'gelu_tanh' or 'clipped_swiglu', not 'relu'"),
        ({"residual_multiplier": 0.0}, "residual_multiplier must be a positive number, not 0.0"),
        ({"window_rope_theta": 1.0}, "window_rope_theta must be a finite number above 1, not 1.0"),
        ({"norm": "batch"}, "norm must be 'rms' or 'layer', not 'batch'"),
        ({"norm_bias": True}, "norm_bias needs norm='layer', norms='before' and no qk_norm"),
        ({"parallel": True}, "norms must be 'before' in a parallel model, not 'around'"),
        ({"activation": "clipped_swiglu", "gated": False}, "activation 'clipped_swiglu' needs a gate"),
        ({"dense_layers": (-1,)}, "dense_layers must be of 3 layers, not (-1,)"),
        ({"rotary_features": 3}, "rotary_features must be an even integer from 2 to 8, not 3"),
        ({"no_rope_layers": (3,)}, "no_rope_layers must be of 3 layers, not (3,)"),
    ],
)
def test_a_bad_option_is_named(change, message):
    with pytest.raises(ValueError) as raised:
        dataclasses.replace(config("gemma3"), **change)
    assert str(raised.value) == message
