"""Granite 3 with a mixture of experts in every layer."""

import dataclasses
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models.families import granite, mixtral
from jaxkv.models.families.family import Family
from jaxkv.models.tensor_names import HF_NAMES


def options(fields: Fields) -> dict[str, Any]:
    """The factors, and the experts."""
    return granite.options(fields) | {"experts": mixtral.experts(fields)}


def header(file: GGUFFile) -> dict[str, Any]:
    """The factors, and the number of experts."""
    return granite.header_factors(file, "granitemoe") | {
        "num_local_experts": file.number("granitemoe.expert_count", int),
        "num_experts_per_tok": file.number("granitemoe.expert_used_count", int),
    }


# Q and K were permuted when the GGUF file was written.
FAMILY = Family(
    model_types=("granitemoe",),
    options=options,
    hf_names=dataclasses.replace(
        HF_NAMES,
        router="block_sparse_moe.router.layer.weight",
        expert_gate_up=("block_sparse_moe.input_linear.weight",),
        expert_down="block_sparse_moe.output_linear.weight",
    ),
    architecture="granitemoe",
    header=header,
    gguf_pairing="interleaved",
)
