"""The planner on published configs: bytes of K and V at 8,192 tokens of 16 bits, and number of parameters."""

import json
from pathlib import Path

import pytest

from jaxkv.planner import ModelShape, kv_cache_bytes, plan

CASES = json.loads((Path(__file__).parent / "fixtures/planner/cases.json").read_text())
# Its layers keep a state of fixed size beside K and V.
REFUSED = {"falcon_h1"}
# The published count has an encoder of images or sound.
WITH_ENCODER = {
    "gemma-3-12b(+vocab,ctx; head_dim elided)",
    "internvl3-8b-hf",
    "voxtral-mini-3b",
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_published_configs_take_the_bytes_and_parameters_they_should(name):
    case = CASES[name]
    model = ModelShape.from_config(case["config"])
    assert kv_cache_bytes(model, 8192, kv_dtype="bf16").exact == case["kv_bytes_8192"]
    if case.get("params") is not None and name not in WITH_ENCODER:
        assert model.num_parameters == pytest.approx(case["params"], rel=0.01)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_counted_is_refused_by_its_model_type(name):
    with pytest.raises(ValueError, match=r"model_type '.*' is not known; known: .*llama"):
        ModelShape.from_config(CASES[name]["config"])


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
