"""Number of weights of the encoders of images and sound beside a language model, with their projectors.

An encoder that is not in `_TOWERS` is left out, which a note of the plan says.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.hf_folder import shown


class _Tower(NamedTuple):
    """One `model_type`: its weights, and the defaults of its class for fields that a config leaves out."""

    weights: Callable[[Fields], int]
    absent: Mapping[str, Any]


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
        known = part.get("model_type") or _USUAL.get(kind if isinstance(kind, str) else "", "")
        tower = _TOWERS.get(known) if isinstance(known, str) else None
        if tower is None:
            notes += (f"the weights of {name} {shown(known)} are not counted",)
            continue
        fields = Fields({**tower.absent, **part})
        project = _PROJECTORS.get(kind) if isinstance(kind, str) else None
        try:
            total += tower.weights(fields) + (0 if project is None else project(fields, hidden))
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


_VIT = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, patch_size=14)
_SIGLIP = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    image_size=224,
    patch_size=16,
    vision_use_head=True,
)
_IDEFICS = dict(hidden_size=1152, intermediate_size=3072, num_hidden_layers=12, image_size=224, patch_size=32)
_SOUND = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_mel_bins=128,
    max_source_positions=1500,
)
_QWEN3 = dict(
    depth=27,
    hidden_size=1152,
    intermediate_size=4304,
    patch_size=16,
    out_hidden_size=3584,
    num_position_embeddings=2304,
    deepstack_visual_indexes=[8, 16, 24],
)
_CLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, image_size=224, patch_size=32)
_LLAMA4 = dict(
    hidden_size=768,
    intermediate_size=5632,
    num_hidden_layers=34,
    image_size=448,
    patch_size=14,
    vision_output_dim=7680,
    projector_input_dim=4096,
    projector_output_dim=4096,
)
_GEMMA4 = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=16,
    num_attention_heads=12,
    head_dim=64,
    patch_size=16,
    position_embedding_size=10240,
)
_QWEN2 = dict(depth=32, embed_dim=1280, hidden_size=3584, mlp_ratio=4, patch_size=14)
_QWEN2_5 = dict(depth=32, hidden_size=3584, intermediate_size=3420, patch_size=14, out_hidden_size=3584)

_TOWERS = {
    "clip_vision_model": _Tower(_clip, _CLIP),
    "siglip_vision_model": _Tower(_siglip, _SIGLIP),
    "idefics3_vision": _Tower(_siglip, _IDEFICS),
    "smolvlm_vision": _Tower(_siglip, _IDEFICS),
    "pixtral": _Tower(_pixtral, _VIT | dict(image_size=1024, patch_size=16)),
    "internvl_vision": _Tower(_internvl, _VIT | dict(image_size=448)),
    "voxtral_encoder": _Tower(_whisper, _SOUND),
    "qwen2_audio_encoder": _Tower(_whisper, _SOUND),
    "qwen2_vl_vision": _Tower(_qwen2_vl, _QWEN2),
    "qwen2_5_vl_vision": _Tower(_qwen2_5_vl, _QWEN2_5),
    "qwen3_vl_vision": _Tower(_qwen3_vl, _QWEN3),
    "qwen3_vl_moe_vision": _Tower(_qwen3_vl, _QWEN3),
    "llama4_vision_model": _Tower(_llama4, _LLAMA4),
    "gemma4_vision": _Tower(_gemma4, _GEMMA4),
}
_TOWERS |= {
    kind: _TOWERS[f"{kind}_vision"] for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
}
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
