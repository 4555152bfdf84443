"""OLMo 2: norms of what attention and MLP add, not of what they read, and of whole queries and keys."""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, header_windows, layer_kinds, windows

OPTIONS = {"norms": "after", "qk_norm": "all"}


def options(fields: Fields) -> dict[str, Any]:
    """The norms; in a GGUF file also the window."""
    kinds = layer_kinds(fields)
    if fields.optional("sliding_window") is None:
        layer_kinds(fields, allowed=(FULL,))
        return OPTIONS
    return OPTIONS | windows(fields, kinds) | {"window_rope_theta": fields.number("rope_theta")}


def header(file: GGUFFile) -> dict[str, Any]:
    """The window of OLMo 3, whose files say that they are OLMo 2; only its full layers scale frequencies."""
    theta = file.number("olmo2.rope.freq_base", float, 10000.0)
    return header_windows(file, "olmo2", 4) | {"rope_theta": theta}


FAMILY = Family(
    model_types=("olmo2",),
    options=options,
    allowed={"sliding_window": ()},
    absent={"rms_norm_eps": 1e-5},
    architecture="olmo2",
    header=header,
)
