"""Llama 2 and 3, and models built alike: SmolLM2, Falcon 3."""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds


def options(fields: Fields) -> dict[str, Any]:
    """The biases."""
    layer_kinds(fields, allowed=(FULL,))
    biased = fields.flag("attention_bias", False)
    return {"qkv_bias": biased, "out_bias": biased, "mlp_bias": fields.flag("mlp_bias", False)}


# Q and K were permuted when the GGUF file was written.
FAMILY = Family(
    model_types=("llama",),
    options=options,
    allowed={"attention_bias": (False, True), "mlp_bias": (False, True)},
    architecture="llama",
    gguf_pairing="interleaved",
)
