"""Qwen 3 with mixtures of experts: all layers, or those that the config names."""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.checkpoints.hf_folder import shown
from jaxkv.models.experts import Experts
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds


def options(fields: Fields) -> dict[str, Any]:
    """The norms of queries and keys, and the experts."""
    layer_kinds(fields, allowed=(FULL,))
    experts = Experts(
        count=fields.integer("num_experts", "num_local_experts", default=128),
        per_token=fields.integer("num_experts_per_tok", default=8),
        intermediate_size=fields.integer("moe_intermediate_size", default=768),
        normalized=fields.flag("norm_topk_prob", False),
    )
    return {"qk_norm": "heads", "experts": experts, "dense_layers": dense_layers(fields)}


def dense_layers(fields: Fields) -> tuple[int, ...]:
    """The layers without experts: those named, and those that a period leaves out."""
    layers, period = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step", default=1)
    named = fields.raw.get("mlp_only_layers") or []
    if not isinstance(named, (list, tuple)) or not all(type(layer) is int for layer in named):
        raise ValueError(f"mlp_only_layers must be a list of integers, not {shown(named)}")
    return tuple(layer for layer in range(layers) if layer in named or (layer + 1) % period)


def header(file: GGUFFile) -> dict[str, Any]:
    """The experts; llama.cpp knows that weights are normalized, and that every layer has experts."""
    return header_experts(file, "qwen3moe") | {"norm_topk_prob": True}


def header_experts(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The sizes of the experts of a GGUF file's header, by their names in a `config.json`."""
    return {
        "num_experts": file.number(f"{architecture}.expert_count", int),
        "num_experts_per_tok": file.number(f"{architecture}.expert_used_count", int),
        "moe_intermediate_size": file.number(f"{architecture}.expert_feed_forward_length", int),
    }


FAMILY = Family(
    model_types=("qwen3_moe",),
    options=options,
    allowed={"use_sliding_window": (False,)},
    absent={"num_key_value_heads": 4, "intermediate_size": 6144},
    architecture="qwen3moe",
    header=header,
)
