"""The checks of `ModelConfig`; every error names the field and what is allowed."""

import math
from typing import TYPE_CHECKING, Literal, get_args

from jaxkv.arguments import whole
from jaxkv.checkpoints.fields import most
from jaxkv.checkpoints.hf_folder import shown
from jaxkv.rope import RopePairing, check_scaling

if TYPE_CHECKING:
    from jaxkv.models.config import ModelConfig  # which imports this module

QKNorm = Literal["heads", "all"]
Norms = Literal["before", "around", "after"]
Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu_tanh", "clipped_swiglu"]

# Names in a `config.json` of the fields with limits.
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_q_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_context": "max_position_embeddings",
    "window": "sliding_window",
}
_POSITIVE = (
    "embedding_multiplier",
    "residual_multiplier",
    "logit_multiplier",
    "query_scale",
    "attention_softcap",
    "logit_softcap",
    "swiglu_limit",
    "swiglu_alpha",
)
_CHOICES = {
    "norms": get_args(Norms),
    "norm": get_args(Norm),
    "qk_norm": (*get_args(QKNorm), None),
    "activation": get_args(Activation),
    "rope_pairing": get_args(RopePairing),
}


def checked_integers(config: "ModelConfig") -> dict[str, int]:
    """The integers that have limits, as Python's.

    Raises:
      ValueError: for one that is not an integer within its limits.
    """
    found: dict[str, int] = {}
    for name, hf_name in _HF_NAMES.items():
        value, limit = getattr(config, name), most(hf_name)
        if name == "window" and value is None:
            continue
        number = whole(value)
        if number is None or not 1 <= number <= limit:
            raise ValueError(f"{name} must be an integer from 1 to {limit}, not {shown(value)}")
        found[name] = number
    if found["num_q_heads"] % found["num_kv_heads"]:
        raise ValueError(
            f"num_kv_heads must divide num_q_heads ({found['num_q_heads']}), not {found['num_kv_heads']}"
        )
    if found["head_dim"] % 2:
        raise ValueError(f"head_dim must be even, not {found['head_dim']}")
    if config.rotary_features is not None:
        rotated, whole_head = whole(config.rotary_features), found["head_dim"]
        if rotated is None or not 2 <= rotated <= whole_head or rotated % 2:
            raise ValueError(
                f"rotary_features must be an even integer from 2 to {whole_head}, "
                f"not {shown(config.rotary_features)}"
            )
        found["rotary_features"] = rotated
    return found


def check_numbers(config: "ModelConfig") -> None:
    """Raises `ValueError` for a number out of range."""
    if not 0.0 < config.rms_norm_eps < 1.0:
        raise ValueError(f"rms_norm_eps must lie between 0 and 1, not {config.rms_norm_eps!r}")
    for name in ("rope_theta", "window_rope_theta"):
        value = getattr(config, name)
        if value is not None and not 1.0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 1, not {value!r}")
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, not {value!r}")
    if config.rope_scaling is not None:
        check_scaling(config.rope_scaling, config.rotary_features or config.head_dim)


def check_choices(config: "ModelConfig") -> None:
    """Raises `ValueError` for an option that does not exist, or does not go with another."""
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            names = " or ".join(map(repr, allowed))
            raise ValueError(f"{name} must be {names}, not {getattr(config, name)!r}")
    if config.parallel and config.norms != "before":
        raise ValueError(f"norms must be 'before' in a parallel model, not {config.norms!r}")
    if config.norm_bias and (config.norm != "layer" or config.norms != "before" or config.qk_norm):
        raise ValueError("norm_bias needs norm='layer', norms='before' and no qk_norm")
    if config.activation == "clipped_swiglu" and not config.gated:
        raise ValueError("activation 'clipped_swiglu' needs a gate")


def check_layers(config: "ModelConfig") -> None:
    """Raises `ValueError` for a list that names other layers than the model has."""
    every = set(range(config.num_layers))
    for name in ("no_rope_layers", "dense_layers"):
        layers = getattr(config, name)
        if not set(layers) <= every:
            raise ValueError(f"{name} must be of {config.num_layers} layers, not {shown(layers)}")
    full = config.full_attention_layers
    if full != () and (config.window is None or not set(full) < every):
        raise ValueError(
            f"full_attention_layers must be some, not all, of {config.num_layers} layers of a model with a "
            f"window, not {shown(full)}"
        )
