"""StarCoder 2: layer norm, an MLP without a gate, and biases everywhere."""

import dataclasses
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds, windows
from jaxkv.models.tensor_names import GGUF_NAMES, HF_NAMES


def options(fields: Fields) -> dict[str, Any]:
    """The norm, the MLP, the biases, and the window of every layer."""
    layer_kinds(fields, allowed=(FULL,))
    biased = fields.flag("use_bias", True)
    return windows(fields, []) | {
        "norm": "layer",
        "norm_bias": True,
        "rms_norm_eps": fields.number("norm_epsilon", 1e-5),
        "qkv_bias": biased,
        "out_bias": biased,
        "mlp_bias": biased,
        "gated": False,
        "activation": "gelu_tanh",
    }


def header(file: GGUFFile) -> dict[str, Any]:
    """What a norm adds, and whether the file has biases."""
    return {
        "norm_epsilon": file.number("starcoder2.attention.layer_norm_epsilon", float),
        "use_bias": "blk.0.attn_q.bias" in file.shapes,
    }


FAMILY = Family(
    model_types=("starcoder2",),
    options=options,
    allowed={
        "hidden_act": ("gelu_pytorch_tanh",),
        "mlp_type": ("default",),
        "norm_type": ("layer_norm",),
    },
    absent={"num_key_value_heads": 2, "tie_word_embeddings": True},
    hf_names=dataclasses.replace(
        HF_NAMES,
        gate_up=("mlp.c_fc.weight",),
        gate_up_bias=("mlp.c_fc.bias",),
        down="mlp.c_proj.weight",
        down_bias="mlp.c_proj.bias",
    ),
    architecture="starcoder2",
    header=header,
    gguf_names=dataclasses.replace(GGUF_NAMES, gate_up=("ffn_up.weight",), gate_up_bias=("ffn_up.bias",)),
)
