"""EXAONE 4: norms of what attention and MLP add, and of each head's queries and keys.

With a window, layers of full attention have no rotary positions.
"""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, by_pattern, header_windows, layer_kinds, windows


def options(fields: Fields) -> dict[str, Any]:
    """The norms, the window, and the layers without rotary positions."""
    norms = {"norms": "after", "qk_norm": "heads"}
    if fields.optional("sliding_window") is None:
        layer_kinds(fields, allowed=(FULL,))
        return norms
    kinds = by_pattern(fields, 4)
    without = tuple(layer for layer, kind in enumerate(kinds) if kind == FULL)
    return norms | windows(fields, kinds) | {"no_rope_layers": without}


def header(file: GGUFFile) -> dict[str, Any]:
    """The window and its layers; llama.cpp knows every fourth for all tokens."""
    return header_windows(file, "exaone4", 4)


FAMILY = Family(
    model_types=("exaone4",),
    options=options,
    absent={"num_key_value_heads": 32, "sliding_window": 4096, "rms_norm_eps": 1e-5},
    architecture="exaone4",
    header=header,
)
