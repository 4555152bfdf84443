"""Gemma 2: norms around attention and MLP, softcaps, a window in every second layer."""

import dataclasses
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import every_nth_full, windows
from jaxkv.models.tensor_names import HF_NAMES

GELU = ("gelu_pytorch_tanh",)
ALLOWED = {
    "hidden_act": GELU,
    "hidden_activation": GELU,
    "use_bidirectional_attention": (False,),
}
# A norm multiplies by one plus its weight; the converter to GGUF adds the one.
NAMES = dataclasses.replace(HF_NAMES, mlp_norm="pre_feedforward_layernorm.weight", norm_offset=1.0)
# llama.cpp recognizes a 27B by its layers; its scores are scaled by the hidden size of a head.
_LAYERS_OF_27B = 46


def options(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 share, and a window in every second layer."""
    return (
        shared(fields)
        | windows(fields, every_nth_full(fields, 2))
        | {
            "attention_softcap": softcap(fields, "attn_logit_softcapping", 50.0),
            "logit_softcap": softcap(fields, "final_logit_softcapping", 30.0),
        }
    )


def shared(fields: Fields) -> dict[str, Any]:
    """The arguments of `ModelConfig` that Gemma 2 and 3 share."""
    scalar = fields.number("query_pre_attn_scalar", 256.0)
    if not scalar > 0:
        raise ValueError(f"query_pre_attn_scalar must be positive, not {scalar!r}")
    return {
        "norms": "around",
        "activation": "gelu_tanh",
        "embedding_multiplier": fields.integer("hidden_size") ** 0.5,
        "query_scale": scalar**-0.5,
    }


def softcap(fields: Fields, name: str, absent: float | None) -> float | None:
    """A softcap; a null is none, and an absent field is `absent`."""
    return absent if name not in fields.raw else None if fields.raw[name] is None else fields.number(name)


def header(file: GGUFFile) -> dict[str, Any]:
    """The fields of `config.json`, as llama.cpp reads them from a header or knows them."""
    caps = {
        name: file.number(f"gemma2.{name}", float, default)
        for name, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    }
    window = file.number("gemma2.attention.sliding_window", int, 4096)
    return caps | {
        "query_pre_attn_scalar": query_scalar(file, "gemma2", _LAYERS_OF_27B),
        "sliding_window": window,
    }


def query_scalar(file: GGUFFile, architecture: str, layers_of_27b: int) -> int:
    """What the square root of which divides a query: the head's width, but in the 27B models."""

    def number(name: str, default: int | None = None) -> int:
        return file.number(f"{architecture}.{name}", int, default)

    per_head = number("embedding_length") // max(number("attention.head_count"), 1)
    return per_head if number("block_count") == layers_of_27b else number("attention.key_length", per_head)


FAMILY = Family(
    model_types=("gemma2",),
    options=options,
    allowed=ALLOWED,
    absent={"tie_word_embeddings": True},
    hf_names=NAMES,
    architecture="gemma2",
    header=header,
)
