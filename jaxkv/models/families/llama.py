"""Llama 2 and 3, and models built alike: SmolLM2, Falcon 3."""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models.families import mixtral
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds


def options(fields: Fields) -> dict[str, Any]:
    """The biases; in a GGUF file also the experts."""
    layer_kinds(fields, allowed=(FULL,))
    biased = fields.flag("attention_bias", False)
    found = {"qkv_bias": biased, "out_bias": biased, "mlp_bias": fields.flag("mlp_bias", False)}
    return found | (mixtral.options(fields) if fields.raw.get("num_local_experts") else {})


def header(file: GGUFFile) -> dict[str, Any]:
    """The experts of Mixtral, whose files say that they are Llama; and whether the file has biases."""
    count = file.number("llama.expert_count", int, 0)
    chosen = file.number("llama.expert_used_count", int) if count else None
    return {
        "num_local_experts": count or None,
        "num_experts_per_tok": chosen,
        "sliding_window": None,
        "attention_bias": "blk.0.attn_q.bias" in file.shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in file.shapes,
    }


# Q and K were permuted when the GGUF file was written.
FAMILY = Family(
    model_types=("llama",),
    options=options,
    allowed={"attention_bias": (False, True), "mlp_bias": (False, True), "num_local_experts": ()},
    architecture="llama",
    header=header,
    gguf_pairing="interleaved",
)
