"""Number of weights of the encoders of images and sound beside a language model, with their projectors.

An encoder that is not in `_TOWERS` is left out, which a note of the plan says. What its class takes for
fields that a config leaves out is in `configs/defaults.json`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxkv import catalog
from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.hf_folder import shown


def encoder_weights(outer: Mapping[str, Any], hidden: int) -> tuple[int, tuple[str, ...]]:
    """Weights of all encoders of a config, with notes on those that are not counted.

    Args:
      outer: the whole config.
      hidden: features of the language model.

    Raises:
      ValueError: for a field that is missing or invalid.
    """
    total, notes, kind = 0, (), outer.get("model_type")
    for name in ("vision_config", "audio_config"):
        part = outer.get(name)
        if not isinstance(part, Mapping):
            continue
        # Older configs leave the type out, or have the whole model's.
        known = part.get("model_type") or (kind if isinstance(kind, str) else "")
        known = _USUAL.get(known, known) if isinstance(known, str) else ""
        tower = _TOWERS.get(known)
        if tower is None:
            notes += (f"the weights of {name} {shown(part.get('model_type'))} are not counted",)
            continue
        fields = Fields({**catalog.defaults()[known], **part})
        project = _PROJECTORS.get(kind) if isinstance(kind, str) else None
        try:
            total += tower(fields) + (0 if project is None else project(fields, hidden))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return total, notes


def _side(fields: Fields, name: str) -> int:
    value = fields.raw.get(name)
    if isinstance(value, (list, tuple)) and value:
        return Fields({name: value[0]}).integer(name)
    return fields.integer(name)


def _patches(fields: Fields) -> tuple[int, int]:
    """Number of patches, and pixels of one."""
    patch = _side(fields, "patch_size")
    return (_side(fields, "image_size") // patch) ** 2, fields.integer("num_channels", default=3) * patch**2


def _layer(hidden: int, width: int, biases: int) -> int:
    """A layer with two norms that have biases, and an MLP of two matrices."""
    return 4 * hidden**2 + biases * hidden + 2 * hidden * width + width + hidden + 4 * hidden


def _sizes(fields: Fields) -> tuple[int, int, int]:
    return (
        fields.integer("hidden_size"),
        fields.integer("intermediate_size"),
        fields.integer("num_hidden_layers"),
    )


def _clip(fields: Fields) -> int:
    hidden, width, layers = _sizes(fields)
    count, pixels = _patches(fields)
    return (pixels + 1 + count + 1 + 4) * hidden + layers * _layer(hidden, width, 4)


def _siglip(fields: Fields) -> int:
    hidden, width, layers = _sizes(fields)
    count, pixels = _patches(fields)
    one = _layer(hidden, width, 4)
    # A pooling head is a layer with one norm and a learned query.
    head = one - hidden if fields.flag("vision_use_head", False) else 0
    return (pixels + 1 + count + 2) * hidden + layers * one + head


def _pixtral(fields: Fields) -> int:
    hidden, width, layers = _sizes(fields)
    return (_patches(fields)[1] + 1) * hidden + layers * (4 * hidden**2 + 3 * hidden * width + 2 * hidden)


def _internvl(fields: Fields) -> int:
    hidden, width, layers = _sizes(fields)
    count, pixels = _patches(fields)
    biases = 4 if fields.flag("attention_bias", False) else 1
    more = 2 + 2 * fields.flag("use_qk_norm", False)
    return (pixels + 1 + count + 2) * hidden + layers * (_layer(hidden, width, biases) + more * hidden)


def _whisper(fields: Fields) -> int:
    hidden, width = fields.integer("hidden_size", "d_model"), fields.integer("intermediate_size")
    layers, inputs = fields.integer("num_hidden_layers"), fields.integer("num_mel_bins")
    positions = fields.integer("max_source_positions")
    convolutions = 3 * inputs * hidden + 3 * hidden**2 + 2 * hidden
    return convolutions + (positions + 2) * hidden + layers * _layer(hidden, width, 3)


def _cube(fields: Fields) -> int:
    """Values of a patch of several frames."""
    pixels = fields.integer("in_channels", "in_chans", default=3) * fields.integer("patch_size") ** 2
    return pixels * fields.integer("temporal_patch_size", default=2)


def _merger(fields: Fields, hidden: int, out: int) -> int:
    merged = fields.integer("spatial_merge_size", default=2) ** 2 * hidden
    return merged**2 + merged + merged * out + out


def _qwen2_vl(fields: Fields) -> int:
    hidden, ratio = fields.integer("embed_dim"), fields.integer("mlp_ratio")
    merger = 2 * hidden + _merger(fields, hidden, fields.integer("hidden_size"))
    layers = fields.integer("depth") * _layer(hidden, ratio * hidden, 4)
    return _cube(fields) * hidden + layers + merger


def _qwen2_5_vl(fields: Fields) -> int:
    hidden, width = fields.integer("hidden_size"), fields.integer("intermediate_size")
    one = 4 * hidden**2 + 4 * hidden + 3 * hidden * width + 2 * width + hidden + 2 * hidden
    merger = hidden + _merger(fields, hidden, fields.integer("out_hidden_size"))
    return _cube(fields) * hidden + fields.integer("depth") * one + merger


def _qwen3_vl(fields: Fields) -> int:
    hidden, width = fields.integer("hidden_size"), fields.integer("intermediate_size")
    merger = _merger(fields, hidden, fields.integer("out_hidden_size"))
    stacked = fields.raw.get("deepstack_visual_indexes") or []
    if not isinstance(stacked, list):
        raise ValueError(f"deepstack_visual_indexes must be a list, not {shown(stacked)}")
    norm = 2 * hidden * fields.integer("spatial_merge_size", default=2) ** 2
    layers = fields.integer("depth") * _layer(hidden, width, 4)
    patches = (_cube(fields) + 1 + fields.integer("num_position_embeddings")) * hidden
    return patches + layers + 2 * hidden + merger + len(stacked) * (norm + merger)


def _llama4(fields: Fields) -> int:
    adapter = fields.integer("intermediate_size") * fields.integer("projector_input_dim")
    # CLIP's without the biases of its patches, and norms before and after the layers.
    return _clip(fields) + adapter + fields.integer("projector_output_dim") ** 2


def _gemma4(fields: Fields) -> int:
    hidden, width, layers = _sizes(fields)
    head_dim, heads = fields.integer("head_dim"), fields.integer("num_attention_heads")
    one = 4 * hidden * heads * head_dim + 2 * head_dim + 3 * hidden * width + 4 * hidden
    positions = 2 * fields.integer("position_embedding_size")
    return (3 * fields.integer("patch_size") ** 2 + positions) * hidden + layers * one


_TOWERS: dict[str, Callable[[Fields], int]] = {
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
    "idefics3_vision": _siglip,
    "smolvlm_vision": _siglip,
    "pixtral": _pixtral,
    "internvl_vision": _internvl,
    "voxtral_encoder": _whisper,
    "qwen2_audio_encoder": _whisper,
    "qwen2_vl_vision": _qwen2_vl,
    "qwen2_5_vl_vision": _qwen2_5_vl,
    "qwen3_vl_vision": _qwen3_vl,
    "qwen3_vl_moe_vision": _qwen3_vl,
    "llama4_vision_model": _llama4,
    "gemma4_vision": _gemma4,
}
# Older configs name the whole model instead.
_USUAL = {
    "gemma3": "siglip_vision_model",
    "paligemma": "siglip_vision_model",
    "llava": "clip_vision_model",
    "llava_next": "clip_vision_model",
    "mistral3": "pixtral",
    "internvl": "internvl_vision",
    "qwen2_vl": "qwen2_vl_vision",
    "qwen2_5_vl": "qwen2_5_vl_vision",
    "qwen3_vl": "qwen3_vl_vision",
    "qwen3_vl_moe": "qwen3_vl_vision",
    "llama4": "llama4_vision_model",
}


def _two_linear(fields: Fields, hidden: int) -> int:
    return (fields.integer("hidden_size") + 1) * hidden + hidden**2 + hidden


def _linear(fields: Fields, hidden: int) -> int:
    return (fields.integer("hidden_size") + 1) * hidden


def _of_gemma3(fields: Fields, hidden: int) -> int:
    return fields.integer("hidden_size") * (hidden + 1)


def _of_mistral3(fields: Fields, hidden: int) -> int:
    own = fields.integer("hidden_size")
    return own + 4 * own**2 + own * hidden + hidden**2


def _of_internvl(fields: Fields, hidden: int) -> int:
    merged = 4 * fields.integer("hidden_size")
    return 2 * merged + (merged + 1) * hidden + hidden**2 + hidden


def _of_voxtral(fields: Fields, hidden: int) -> int:
    return fields.integer("intermediate_size") * hidden + hidden**2


def _of_idefics3(fields: Fields, hidden: int) -> int:
    return 4 * fields.integer("hidden_size") * hidden


def _of_llama4(fields: Fields, hidden: int) -> int:
    return fields.integer("vision_output_dim") * hidden


def _of_gemma4(fields: Fields, hidden: int) -> int:
    return fields.integer("hidden_size") * hidden


_PROJECTORS: dict[str, Callable[[Fields, int], int]] = {
    "llava": _two_linear,
    "llava_next": _two_linear,
    "llava_onevision": _two_linear,
    "mistral3": _of_mistral3,
    "internvl": _of_internvl,
    "gemma3": _of_gemma3,
    "gemma4": _of_gemma4,
    "paligemma": _linear,
    "qwen2_audio": _linear,
    "voxtral": _of_voxtral,
    "idefics3": _of_idefics3,
    "smolvlm": _of_idefics3,
    "llama4": _of_llama4,
}

# Whether a class ties the output projection to the embedding, if neither part of the config says so.
TIED = {"mistral3": True, "internvl": True, "voxtral": True}
