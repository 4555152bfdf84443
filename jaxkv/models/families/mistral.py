"""Mistral: Llama with a window, in every layer or those that `layer_types` names. In GGUF it is Llama."""

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import layer_kinds, windows


def options(fields: Fields) -> dict:
    """The window."""
    return windows(fields, layer_kinds(fields))


FAMILY = Family(model_types=("mistral",), options=options)
