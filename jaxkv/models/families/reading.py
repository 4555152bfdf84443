"""What the families' `config.json` files have in common."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.hf_folder import (
    original_positions,
    rotary_type,
    shown,
    trained_context,
)
from jaxkv.models.families.family import Family
from jaxkv.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

# Values that a field may have, unless the family says otherwise.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization": (),
}


def config_arguments(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The arguments of `ModelConfig` for a `config.json` of a family.

    Raises:
      ValueError: if a feature is not supported, or a field is missing or out of range; the message names it.
    """
    raw = {**family.absent, **raw}
    settings = family.rotary(raw)
    for name, allowed in {**ALLOWED, **family.allowed}.items():
        _refuse_all_but(name, raw.get(name), allowed)
    _refuse_quantization(raw.get("quantization_config"), family.quantizations)
    fields = Fields(raw)
    hidden, q_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default=q_heads)
    if q_heads % kv_heads:
        raise ValueError(f"num_key_value_heads must divide num_attention_heads ({q_heads}), not {kv_heads}")
    head_dim = fields.integer("head_dim", default=hidden // q_heads)
    layers, positions = fields.integer("num_hidden_layers"), fields.integer("max_position_embeddings")
    scaling = rope_scaling(raw, settings, positions)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_q_heads": q_heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": fields.integer("intermediate_size"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": Fields(settings).number("rope_theta", fields.number("rope_theta", 1e4)),
        "rope_scaling": scaling,
        "rope_pairing": family.hf_pairing,
        "rotary_features": _rotary_features(raw, settings, family, head_dim),
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
        # Dynamic scaling changes nothing within the model's own context; see `ModelConfig.for_context`.
        "max_context": positions if isinstance(scaling, DynamicScaling) else trained_context(raw, positions),
        **family.options(fields),
    }


def _refuse_all_but(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if value is None or value in allowed:
        return
    only = f"; supported: {', '.join(map(repr, allowed))}" if allowed else ""
    raise ValueError(f"{name} {shown(value)} is not supported{only}")


def _refuse_quantization(settings: object, allowed: tuple[str, ...]) -> None:
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if not isinstance(method, str) or method not in allowed:
        _refuse_all_but("quantization_config", settings, allowed)


def _rotary_features(
    raw: Mapping[str, Any], settings: Mapping[str, Any], family: Family, head_dim: int
) -> int | None:
    """Features of a head that are rotated; None is all."""
    name = "partial_rotary_factor"
    part = Fields(settings).number(name, Fields(raw).number(name, family.partial_rotary or 1.0))
    if family.partial_rotary is None:
        _refuse_all_but(name, part, (1.0,))
    if part == 1.0:
        return None
    features = int(head_dim * part) if 0.0 < part < 1.0 else 0
    if features < 2 or features % 2:
        raise ValueError(f"{name} must make an even part of {head_dim} features, not {part!r}")
    return features


def rope_scaling(raw: Mapping[str, Any], settings: Mapping[str, Any], positions: int) -> RopeScaling | None:
    """The scaling of rotary settings, or None.

    Raises:
      ValueError: for an unsupported kind, or a field that is missing or invalid.
    """
    kind = rotary_type(settings)
    if kind == "default":
        return None
    if kind not in _SCALINGS:
        supported = ", ".join(("default", *_SCALINGS))
        raise ValueError(f"rope_scaling {shown(kind)} is not supported; supported: {supported}")
    return _SCALINGS[kind](raw, Fields(settings), positions)


def _linear(_: Mapping[str, Any], fields: Fields, __: int) -> RopeScaling:
    return LinearScaling(factor=fields.number("factor"))


def _llama3(raw: Mapping[str, Any], fields: Fields, positions: int) -> RopeScaling:
    return Llama3Scaling(
        factor=fields.number("factor"),
        low_freq_factor=fields.number("low_freq_factor"),
        high_freq_factor=fields.number("high_freq_factor"),
        original_max_position=original_positions(raw, fields.raw, positions),
    )


def _dynamic(_: Mapping[str, Any], fields: Fields, positions: int) -> RopeScaling:
    # `original_max_position_embeddings` has no effect in `transformers` either.
    return DynamicScaling(factor=fields.number("factor"), original_max_position=positions)


def _yarn(raw: Mapping[str, Any], fields: Fields, positions: int) -> RopeScaling:
    original = original_positions(raw, fields.raw, positions)
    factor = fields.number("factor", positions / original)
    wide, of_all = (fields.number(name, 0.0) for name in ("mscale", "mscale_all_dim"))
    both = bool(wide and of_all)
    usual = _mscale(factor, wide) / _mscale(factor, of_all) if both else _mscale(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_max_position=original,
        beta_fast=fields.number("beta_fast", 0.0) or 32.0,
        beta_slow=fields.number("beta_slow", 0.0) or 1.0,
        truncate=fields.flag("truncate", True),
        magnitude=fields.number("attention_factor", usual),
    )


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _longrope(raw: Mapping[str, Any], fields: Fields, positions: int) -> RopeScaling:
    original = original_positions(raw, fields.raw, positions)
    factor = fields.number("factor", positions / original)
    stretched = factor > 1.0 and original > 1
    usual = math.sqrt(1.0 + math.log(factor) / math.log(original)) if stretched else 1.0
    return LongRopeScaling(
        short_factors=_numbers(fields, "short_factor"),
        long_factors=_numbers(fields, "long_factor"),
        original_max_position=original,
        magnitude=fields.number("attention_factor", usual),
    )


def _numbers(fields: Fields, name: str) -> tuple[float, ...]:
    values = fields.raw.get(name)
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"rope_scaling's {name} must be a list of numbers, not {shown(values)}")
    return tuple(Fields({name: value}).number(name) for value in values)


_SCALINGS: dict[str, Callable[[Mapping[str, Any], Fields, int], RopeScaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
