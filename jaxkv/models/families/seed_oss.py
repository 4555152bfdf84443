"""Seed-OSS: Llama with biases of Q, K and V."""

import dataclasses
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds
from jaxkv.models.tensor_names import GGUF_NAMES


def options(fields: Fields) -> dict[str, Any]:
    """The biases."""
    layer_kinds(fields, allowed=(FULL,))
    return {"qkv_bias": fields.flag("attention_bias", True)}


def header(file: GGUFFile) -> dict[str, Any]:
    """Whether the file has biases."""
    return {"attention_bias": "blk.0.attn_q.bias" in file.shapes}


FAMILY = Family(
    model_types=("seed_oss",),
    options=options,
    allowed={"attention_bias": (False, True), "attention_out_bias": (False,)},
    absent={"num_key_value_heads": 8, "head_dim": 128},
    architecture="seed_oss",
    header=header,
    gguf_names=dataclasses.replace(GGUF_NAMES, mlp_norm="post_attention_norm.weight"),
)
