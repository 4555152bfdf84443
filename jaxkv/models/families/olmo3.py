"""OLMo 3: OLMo 2 with a window in three of four layers, whose rotary frequencies are not scaled."""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.families import gemma3, olmo2
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import every_nth_full, windows


def options(fields: Fields) -> dict[str, Any]:
    """The norms, and the window."""
    theta = gemma3.window_theta(fields, fields.number("rope_theta"))
    return olmo2.OPTIONS | windows(fields, every_nth_full(fields, 4)) | {"window_rope_theta": theta}


FAMILY = Family(
    model_types=("olmo3",),
    options=options,
    # Of another one, `transformers` 5 gives layers with a window the default, and 4 gives them this one.
    allowed={"rope_theta": (500000.0,)},
    rotary=gemma3.rotary,
    absent={"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096},
)
