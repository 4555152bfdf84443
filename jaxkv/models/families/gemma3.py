"""Gemma 3, text: Gemma 2 without softcaps, with norms of queries and keys, five windows to one full layer."""

from collections.abc import Mapping
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.checkpoints.hf_folder import of_full_attention, rotary_settings, rotary_type, shown
from jaxkv.models.families import gemma2
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import by_pattern, windows

_LAYERS_OF_27B = 62


def rotary(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of layers with full attention; the older `rope_scaling` is theirs alone.

    Raises:
      ValueError: for a `rope_scaling` that names its type by `type` alone, which `transformers` reads and
        does not apply.
    """
    settings, own = rotary_settings(raw), by_kind(raw).get("full_attention")
    if settings is raw.get("rope_scaling"):
        own = own if isinstance(own, Mapping) else {}
        rotary_type({**own, **settings})  # refuses a factor without a type
        merged = {"rope_type": "default", **own, **settings}
        if (kind := settings.get("type")) not in (None, merged["rope_type"]):
            raise ValueError(f"rope_scaling must name its type as rope_type, not as type {shown(kind)}")
        settings = merged
    # `transformers` reads it from the settings of all layers only, which these models do not have.
    return {name: value for name, value in of_full_attention(settings).items() if name != "truncate"}


def by_kind(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of each kind of layer; empty if the config has none.

    Raises:
      ValueError: for settings of no kind of layer, which `transformers` reads and does not apply.
    """
    settings = raw.get("rope_parameters")
    if not isinstance(settings, Mapping):
        return {}
    for name, value in settings.items():
        if name not in ("full_attention", "sliding_attention") and value is not None:
            raise ValueError(
                "rope_parameters must have settings for full_attention and for sliding_attention; "
                f"{shown(name)} is of neither"
            )
    return settings


def options(fields: Fields) -> dict[str, Any]:
    """The arguments of `ModelConfig`; layers with a window rotate by a base of their own, unscaled."""
    return (
        gemma2.shared(fields)
        | windows(fields, by_pattern(fields, 6))
        | {
            "qk_norm": "heads",
            "window_rope_theta": window_theta(fields, fields.number("rope_local_base_freq", 1e4)),
            "logit_softcap": gemma2.softcap(fields, "final_logit_softcapping", None),
        }
    )


def window_theta(fields: Fields, absent: float) -> float:
    """The base of layers with a window, `absent` if the settings do not say; their scaling is refused."""
    settings = by_kind(fields.raw).get("sliding_attention")
    if not isinstance(settings, Mapping):
        return absent
    if (kind := rotary_type(settings)) != "default":
        raise ValueError(
            f"rope_parameters of sliding_attention: {shown(kind)} is not supported; supported: default"
        )
    return Fields(settings).number("rope_theta", absent)


def header(file: GGUFFile) -> dict[str, Any]:
    """The fields of `config.json`, as llama.cpp reads them from a header or knows them."""
    name = "gemma3.final_logit_softcapping"
    return {
        "query_pre_attn_scalar": gemma2.query_scalar(file, "gemma3", _LAYERS_OF_27B),
        "sliding_window": file.number("gemma3.attention.sliding_window", int),
        "sliding_window_pattern": file.number("gemma3.attention.sliding_window_pattern", int, 6),
        "rope_local_base_freq": file.number("gemma3.rope.freq_base_swa", float, 1e4),
        "final_logit_softcapping": file.number(name, float, 0.0) or None,
    }


FAMILY = Family(
    model_types=("gemma3_text",),
    options=options,
    # `transformers` reads this field, and does not apply it.
    allowed={**gemma2.ALLOWED, "attn_logit_softcapping": ()},
    rotary=rotary,
    absent={
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "num_attention_heads": 8,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
    wrappers=("gemma3",),
    # `transformers` applies it to the language model alone.
    not_in_wrappers=("final_logit_softcapping",),
    hf_names=gemma2.NAMES,
    architecture="gemma3",
    header=header,
)
