"""The supported families. A new one is a file beside this one, and a line here."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from jaxkv.checkpoints.hf_folder import closest, shown
from jaxkv.models.families.family import Family

_FILES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "olmo3",
    "granite",
    "granite_moe",
    "smollm3",
    "seed_oss",
    "exaone4",
    "ernie4_5",
    "gpt_oss",
    "cohere2",
    "glm4",
    "starcoder2",
)
FAMILIES: tuple[Family, ...] = tuple(import_module(f"{__package__}.{file}").FAMILY for file in _FILES)
BY_MODEL_TYPE = {kind: family for family in FAMILIES for kind in family.model_types}
BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES if family.architecture}
_WRAPPERS = {kind: family for family in FAMILIES for kind in family.wrappers}


def is_wrapper(raw: Mapping[str, Any]) -> bool:
    """Whether a `config.json` holds the language model's config as its `text_config`."""
    kind = raw.get("model_type")
    return isinstance(kind, str) and kind in _WRAPPERS and isinstance(raw.get("text_config"), Mapping)


def text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's config; fields that may lie outside it, as quantization, are taken along.

    Raises:
      ValueError: for a field that the wrapping model does not apply.
    """
    if not is_wrapper(raw):
        return raw
    for name in _WRAPPERS[raw["model_type"]].not_in_wrappers:
        if (value := raw["text_config"].get(name)) is not None:
            raise ValueError(f"{name} {shown(value)} is not supported in a {raw['model_type']} config")
    outside = ("quantization_config", "quantization", "tie_word_embeddings")
    return {name: raw[name] for name in outside if name in raw} | dict(raw["text_config"])


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of a language model's config.

    Raises:
      ValueError: for an unsupported `model_type`, naming the supported ones most like it.
    """
    kind = raw.get("model_type")
    if kind is None:
        raise ValueError("field 'model_type' is missing")
    if not isinstance(kind, str) or kind not in BY_MODEL_TYPE:
        supported = closest(kind, BY_MODEL_TYPE)
        raise ValueError(f"model_type {shown(kind)} is not supported; supported: {supported}")
    return BY_MODEL_TYPE[kind]
