"""Qwen 3: a norm of each head's queries and keys. Configs name a window that is switched off."""

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds


def options(fields: Fields) -> dict:
    """The norms of queries and keys."""
    layer_kinds(fields, allowed=(FULL,))
    return {"qk_norm": "heads"}


FAMILY = Family(
    model_types=("qwen3",),
    options=options,
    allowed={"use_sliding_window": (False,)},
    architecture="qwen3",
)
