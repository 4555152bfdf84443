"""The planner on published configs: bytes of K and V at 8,192 tokens of 16 bits, and number of parameters."""

import json
from pathlib import Path

import pytest

from jaxkv.planner import ModelShape, kv_cache_bytes

CASES = json.loads((Path(__file__).parent / "fixtures/planner/cases.json").read_text())
# Layers of which some keep a state of fixed size.
REFUSED = {"Qwen/Qwen3.5-27B", "falcon_h1", "qwen3_next"}
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
