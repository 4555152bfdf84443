"""The planner on published configs: bytes of K and V at 8,192 tokens of 16 bits, and number of parameters."""

import copy
import json
import random
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


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_configs_have_a_plan_or_one_clear_line(count):
    random_of = random.Random(count)
    odd = [None, -1, 0, 1, 3, 2**70, 1e9, float("nan"), "x", "", [], {}, [1], {"a": 1}, True, False]
    for _ in range(count):
        config = copy.deepcopy(random_of.choice(list(CASES.values()))["config"])
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
