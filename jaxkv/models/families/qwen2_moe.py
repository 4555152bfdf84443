"""Qwen 1.5 and 2 with mixtures of experts: beside those chosen, one that every token uses."""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.experts import Experts
from jaxkv.models.families import qwen3_moe
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds


def options(fields: Fields) -> dict[str, Any]:
    """The biases, and the experts."""
    layer_kinds(fields, allowed=(FULL,))
    experts = Experts(
        count=fields.integer("num_experts", default=60),
        per_token=fields.integer("num_experts_per_tok", default=4),
        intermediate_size=fields.integer("moe_intermediate_size", default=1408),
        normalized=fields.flag("norm_topk_prob", False),
        shared_size=fields.integer("shared_expert_intermediate_size", default=5632),
        shared_gate=True,
    )
    return {
        "qkv_bias": fields.flag("qkv_bias", True),
        "experts": experts,
        "dense_layers": qwen3_moe.dense_layers(fields),
    }


FAMILY = Family(
    model_types=("qwen2_moe",),
    options=options,
    allowed={"use_sliding_window": (False,)},
    absent={"num_key_value_heads": 16, "intermediate_size": 5632},
)
