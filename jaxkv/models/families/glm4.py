"""GLM-4: norms around attention and MLP, biases of Q, K and V, the first half of a head rotated."""

import dataclasses
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds
from jaxkv.models.tensor_names import GGUF_NAMES, HF_NAMES


def options(fields: Fields) -> dict[str, Any]:
    """The norms and the biases."""
    layer_kinds(fields, allowed=(FULL,))
    return {"norms": "around", "qkv_bias": fields.flag("attention_bias", True)}


def header(file: GGUFFile) -> dict[str, Any]:
    """Whether the file has biases."""
    return {"attention_bias": "blk.0.attn_q.bias" in file.shapes}


FAMILY = Family(
    model_types=("glm4",),
    options=options,
    allowed={"attention_bias": (False, True)},
    partial_rotary=0.5,
    absent={"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7},
    hf_names=dataclasses.replace(
        HF_NAMES,
        attention_post_norm="post_self_attn_layernorm.weight",
        gate_up=("mlp.gate_up_proj.weight",),
        mlp_post_norm="post_mlp_layernorm.weight",
    ),
    hf_pairing="interleaved",
    architecture="glm4",
    header=header,
    gguf_names=dataclasses.replace(GGUF_NAMES, gate_up=("ffn_up.weight",)),
    gguf_pairing="interleaved",
)
