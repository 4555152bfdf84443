"""Cohere 2: attention and MLP side by side, layer norm; rotary positions only in layers with a window."""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, by_pattern, header_windows, windows


def options(fields: Fields) -> dict[str, Any]:
    """The norm, the window, the biases of attention, and the factor of the logits."""
    kinds = by_pattern(fields, 4)
    biased = fields.flag("attention_bias", False)
    return windows(fields, kinds) | {
        "norm": "layer",
        "rms_norm_eps": fields.number("layer_norm_eps", 1e-5),
        "parallel": True,
        "no_rope_layers": tuple(layer for layer, kind in enumerate(kinds) if kind == FULL),
        "qkv_bias": biased,
        "out_bias": biased,
        "logit_multiplier": fields.number("logit_scale", 0.0625),
    }


def header(file: GGUFFile) -> dict[str, Any]:
    """The window and its layers, what a norm adds, and the factor of the logits."""
    return header_windows(file, "cohere2", 4) | {
        "layer_norm_eps": file.number("cohere2.attention.layer_norm_epsilon", float),
        "logit_scale": file.number("cohere2.logit_scale", float),
    }


FAMILY = Family(
    model_types=("cohere2",),
    options=options,
    allowed={
        "attention_bias": (False, True),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
        "use_qk_norm": (False,),
    },
    absent={"sliding_window": 4096, "tie_word_embeddings": True},
    hf_pairing="interleaved",
    architecture="cohere2",
    header=header,
    gguf_pairing="interleaved",
)
