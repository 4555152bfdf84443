"""SmolLM 3: Llama without rotary positions in every fourth layer."""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.checkpoints.hf_folder import shown
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds


def options(fields: Fields) -> dict[str, Any]:
    """The layers without rotary positions; `no_rope_layers` has a 0 for each of them."""
    layer_kinds(fields, allowed=(FULL,))
    layers, period = fields.integer("num_hidden_layers"), fields.integer("no_rope_layer_interval", default=4)
    rotated = fields.raw.get("no_rope_layers")
    if rotated is None:
        rotated = [int(layer % period != 0) for layer in range(1, layers + 1)]
    flags = isinstance(rotated, list) and all(type(flag) is int and flag in (0, 1) for flag in rotated)
    if not flags or len(rotated) != layers:
        raise ValueError(f"no_rope_layers must be a list of {layers} times 0 or 1, not {shown(rotated)}")
    return {"no_rope_layers": tuple(layer for layer, flag in enumerate(rotated) if not flag)}


def header(_: GGUFFile) -> dict[str, Any]:
    """Nothing: llama.cpp knows every fourth layer."""
    return {"no_rope_layer_interval": 4}


# Q and K were permuted when the GGUF file was written.
FAMILY = Family(
    model_types=("smollm3",),
    options=options,
    allowed={"use_sliding_window": (False,)},
    absent={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
    architecture="smollm3",
    header=header,
    gguf_pairing="interleaved",
)
