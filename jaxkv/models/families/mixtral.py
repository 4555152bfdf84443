"""Mixtral: Llama with a mixture of experts in every layer."""

import dataclasses
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.experts import Experts
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds, windows
from jaxkv.models.tensor_names import HF_NAMES


def options(fields: Fields) -> dict[str, Any]:
    """The experts, and the window of every layer."""
    layer_kinds(fields, allowed=(FULL,))
    return {"experts": experts(fields)} | windows(fields, [])


def experts(fields: Fields) -> Experts:
    """Experts in place of the MLP, of its width."""
    return Experts(
        count=fields.integer("num_local_experts", "num_experts", default=8),
        per_token=fields.integer("num_experts_per_tok", default=2),
        intermediate_size=fields.integer("intermediate_size"),
    )


FAMILY = Family(
    model_types=("mixtral",),
    options=options,
    absent={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    hf_names=dataclasses.replace(
        HF_NAMES,
        router="block_sparse_moe.gate.weight",
        expert_gate_up=(
            "block_sparse_moe.experts.{expert}.w1.weight",
            "block_sparse_moe.experts.{expert}.w3.weight",
        ),
        expert_down="block_sparse_moe.experts.{expert}.w2.weight",
    ),
)
