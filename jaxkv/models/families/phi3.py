"""Phi 3 and 4: Llama with Q, K, V in one tensor, gate and up in another; longrope, part of a head rotated."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.checkpoints.hf_folder import rotary_settings, rotary_type
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds, windows
from jaxkv.models.tensor_names import GGUF_NAMES, HF_NAMES


def options(fields: Fields) -> dict[str, Any]:
    """The window of every layer."""
    layer_kinds(fields, allowed=(FULL,))
    return windows(fields, [])


def rotary(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings, by the present name of longrope."""
    settings = rotary_settings(raw)
    older = rotary_type(settings) in ("su", "yarn")
    return {**settings, "rope_type": "longrope"} if older else settings


def header(file: GGUFFile) -> dict[str, Any]:
    """The window, where 0 is none."""
    return {"sliding_window": file.number("phi3.attention.sliding_window", int, 0) or None}


FAMILY = Family(
    model_types=("phi3",),
    options=options,
    rotary=rotary,
    partial_rotary=1.0,
    absent={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    hf_names=dataclasses.replace(
        HF_NAMES, qkv=("self_attn.qkv_proj.weight",), gate_up=("mlp.gate_up_proj.weight",)
    ),
    architecture="phi3",
    header=header,
    gguf_names=dataclasses.replace(GGUF_NAMES, qkv=("attn_qkv.weight",), gate_up=("ffn_up.weight",)),
)
