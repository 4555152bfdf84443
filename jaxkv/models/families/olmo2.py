"""OLMo 2: norms of what attention and MLP add, not of what they read, and of whole queries and keys."""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds

OPTIONS = {"norms": "after", "qk_norm": "all"}


def options(fields: Fields) -> dict[str, Any]:
    """The norms."""
    layer_kinds(fields, allowed=(FULL,))
    return OPTIONS


FAMILY = Family(model_types=("olmo2",), options=options, absent={"rms_norm_eps": 1e-5}, architecture="olmo2")
