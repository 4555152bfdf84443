"""Mistral and Ministral: Llama with a window, in all layers or those that `layer_types` names.

Mistral Small 3.1 and later have them as the text part of a nested config.
"""

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import layer_kinds, windows


def options(fields: Fields) -> dict:
    """The window."""
    return windows(fields, layer_kinds(fields))


# GGUF files of these say that they are Llama.
FAMILY = Family(
    model_types=("mistral", "ministral"),
    options=options,
    absent={"num_key_value_heads": 8, "sliding_window": 4096},
    wrappers=("mistral3",),
)
