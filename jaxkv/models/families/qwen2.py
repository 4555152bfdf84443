"""Qwen 2 and 2.5: biases of Q, K and V. Configs name a window that is switched off."""

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds


def options(fields: Fields) -> dict:
    """The biases."""
    layer_kinds(fields, allowed=(FULL,))
    return {"qkv_bias": True}


FAMILY = Family(
    model_types=("qwen2",),
    options=options,
    allowed={"use_sliding_window": (False,)},
    architecture="qwen2",
)
