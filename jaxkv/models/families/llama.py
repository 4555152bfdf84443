"""Llama 2 and 3, and models built alike: SmolLM2, Falcon 3."""

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds


def options(fields: Fields) -> dict:
    """Nothing beyond the common fields."""
    layer_kinds(fields, allowed=(FULL,))
    return {}


# Q and K were permuted when the GGUF file was written.
FAMILY = Family(model_types=("llama",), options=options, architecture="llama", gguf_pairing="interleaved")
