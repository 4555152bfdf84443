"""Phi 3 and 4 without long contexts: Llama with Q, K, V in one tensor, gate and up in another."""

import dataclasses
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import layer_kinds, windows
from jaxkv.models.tensor_names import HF_NAMES


def options(fields: Fields) -> dict[str, Any]:
    """The window."""
    return windows(fields, layer_kinds(fields))


FAMILY = Family(
    model_types=("phi3",),
    options=options,
    absent={"rms_norm_eps": 1e-5},
    hf_names=dataclasses.replace(
        HF_NAMES, qkv=("self_attn.qkv_proj.weight",), gate_up=("mlp.gate_up_proj.weight",)
    ),
)
