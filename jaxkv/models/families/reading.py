"""What the families' `config.json` files have in common."""

from collections.abc import Mapping
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.hf_folder import original_positions, rotary_type, shown, trained_context
from jaxkv.models.families.family import Family
from jaxkv.rope import LinearScaling, Llama3Scaling, RopeScaling

# Values that a field may have, unless the family says otherwise.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
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
    _refuse_all_but("partial_rotary_factor", settings.get("partial_rotary_factor"), (1, 1.0))
    fields = Fields(raw)
    hidden, q_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers, positions = fields.integer("num_hidden_layers"), fields.integer("max_position_embeddings")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_q_heads": q_heads,
        "num_kv_heads": fields.integer("num_key_value_heads", default=q_heads),
        "head_dim": fields.integer("head_dim", default=hidden // q_heads),
        "intermediate_size": fields.integer("intermediate_size"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": Fields(settings).number("rope_theta", fields.number("rope_theta", 1e4)),
        "rope_scaling": rope_scaling(raw, settings, positions),
        "rope_pairing": family.hf_pairing,
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
        "max_context": trained_context(raw, positions),
        **family.options(fields),
    }


def _refuse_all_but(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if value is None or value in allowed:
        return
    only = f"; supported: {', '.join(map(repr, allowed))}" if allowed else ""
    raise ValueError(f"{name} {shown(value)} is not supported{only}")


def rope_scaling(raw: Mapping[str, Any], settings: Mapping[str, Any], positions: int) -> RopeScaling | None:
    """The scaling of rotary settings, or None.

    Raises:
      ValueError: for an unsupported kind, or a field that is missing or invalid.
    """
    kind = rotary_type(settings)
    if kind == "default":
        return None
    fields = Fields(settings)
    if kind == "linear":
        return LinearScaling(factor=fields.number("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=fields.number("factor"),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
            original_max_position=original_positions(raw, settings, positions),
        )
    raise ValueError(f"rope_scaling {shown(kind)} is not supported; supported: default, linear, llama3")
