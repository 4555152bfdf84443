"""What a Llama-family model is, as static numbers, and reading them from a `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

from jaxkv.arguments import whole
from jaxkv.checkpoints.hf_folder import (
    MOST_POSITIONS,
    original_positions,
    read_json,
    rotary_settings,
    rotary_type,
    shown,
    trained_context,
    with_defaults,
)
from jaxkv.config import CacheConfig
from jaxkv.rope import LinearScaling, Llama3Scaling, Rope, RopePairing, RopeScaling, check_scaling

SUPPORTED_ARCHITECTURES = ("llama", "mistral", "qwen2")

# Far above any published model: beyond these a number is a damaged file, not a large model.
_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "num_layers": 2**12,
    "num_q_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**12,
    "intermediate_size": 2**20,
    "max_context": MOST_POSITIONS,
    "window": MOST_POSITIONS,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The static sizes and choices of one Llama-family model; hashable, so `jit` can key on it.

    Attributes:
      vocab_size: tokens the model knows.
      hidden_size: width of the residual stream, in features.
      num_layers: transformer blocks.
      num_q_heads: query heads.
      num_kv_heads: key and value heads; divides `num_q_heads`.
      head_dim: features of one head; even.
      intermediate_size: width of the MLP, in features.
      rms_norm_eps: added to the mean square before its root.
      rope_theta: the base of the rotary frequencies.
      rope_pairing: which features turn together; see `jaxkv.rope.rotate`.
      rope_scaling: how the frequencies were stretched, or None.
      qkv_bias: whether the Q, K and V projections add a bias (Qwen2).
      tied_embeddings: whether the output projection is the embedding table.
      window: how many of the latest tokens a token attends to, itself included; None is all.
      full_attention_layers: the layers that attend to all tokens although there is a window, in order.
      max_context: tokens of context the model is made for, its rotary scaling counted in.

    Raises:
      ValueError: for a field out of range, naming it.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_pairing: RopePairing = "half"
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    tied_embeddings: bool = False
    window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    max_context: int

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            number = whole(value)
            if number is None or not 1 <= number <= limit:
                raise ValueError(f"{name} must be an integer from 1 to {limit}, not {shown(value)}")
            object.__setattr__(self, name, number)
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_q_heads ({self.num_q_heads}), not {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, not {self.head_dim}")
        if not 0.0 < self.rms_norm_eps < 1.0:
            raise ValueError(f"rms_norm_eps must lie between 0 and 1, not {self.rms_norm_eps!r}")
        if not 1.0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be a finite number above 1, not {self.rope_theta!r}")
        if self.rope_pairing not in ("half", "interleaved"):
            raise ValueError(f"rope_pairing must be 'half' or 'interleaved', not {self.rope_pairing!r}")
        if self.rope_scaling is not None:
            check_scaling(self.rope_scaling, self.head_dim)
        full = self.full_attention_layers
        if full != () and (self.window is None or not set(full) < set(range(self.num_layers))):
            raise ValueError(
                f"full_attention_layers must be some, not all, of {self.num_layers} layers of a model with a "
                f"window, not {shown(full)}"
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, in tokens; None is all of them."""
        full = set(self.full_attention_layers)
        return tuple(None if layer in full else self.window for layer in range(self.num_layers))

    @property
    def q_features(self) -> int:
        """Features of all query heads together."""
        return self.num_q_heads * self.head_dim

    @property
    def kv_features(self) -> int:
        """Features of all key heads together, and as many of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def rope(self) -> Rope:
        """How keys are turned to their positions."""
        return Rope.of(self.head_dim, self.rope_theta, self.rope_scaling, self.rope_pairing)

    def cache_config(self, **options: Any) -> CacheConfig:
        """A `jaxkv.CacheConfig` for this model; `options` are its other arguments.

        Raises:
          ValueError: as `CacheConfig` does.
        """
        return CacheConfig(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            **options,
        )

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | PathLike[str]) -> Self:
        """Reads a Hugging Face `config.json`, given as its contents, its path or its folder.

        Raises:
          ValueError: when the file cannot be read, the architecture or a feature of it is not
              supported, or a field is missing or out of range; the message names it.
        """
        raw = with_defaults(source if isinstance(source, Mapping) else read_json(Path(source)))
        _refuse_unsupported(raw)
        hidden, q_heads = _field(raw, "hidden_size", int), _field(raw, "num_attention_heads", int)
        layers, positions = _field(raw, "num_hidden_layers", int), _field(raw, "max_position_embeddings", int)
        window, full_attention_layers = _windows(raw, layers)
        return cls(
            vocab_size=_field(raw, "vocab_size", int),
            hidden_size=hidden,
            num_layers=layers,
            num_q_heads=q_heads,
            num_kv_heads=_field(raw, "num_key_value_heads", int, q_heads),
            head_dim=_field(raw, "head_dim", int, hidden // q_heads),
            intermediate_size=_field(raw, "intermediate_size", int),
            rms_norm_eps=_field(raw, "rms_norm_eps", float, 1e-6),
            rope_theta=_field(
                rotary_settings(raw), "rope_theta", float, _field(raw, "rope_theta", float, 1e4)
            ),
            rope_scaling=_rope_scaling(raw, positions),
            qkv_bias=raw["model_type"] == "qwen2",
            tied_embeddings=_field(raw, "tie_word_embeddings", bool, False),
            window=window,
            full_attention_layers=full_attention_layers,
            max_context=trained_context(raw, positions),
        )


_MISSING = object()
# What a `config.json` calls these; other fields have the same names.
_HF_NAMES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_q_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_context",
    "sliding_window": "window",
}
_KINDS = {int: "an integer", float: "a number", bool: "true or false"}


def _field(raw: Mapping[str, Any], name: str, kind: type, default: Any = _MISSING) -> Any:
    value = raw.get(name)
    if value is None:
        if default is _MISSING:
            raise ValueError(f"field {name!r} is missing")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 1000:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be {_KINDS[kind]}, not {shown(value)}")
    if kind is int and not 1 <= value <= _LIMITS[_HF_NAMES.get(name, name)]:
        limit = _LIMITS[_HF_NAMES.get(name, name)]
        raise ValueError(f"{name} must be an integer from 1 to {limit}, not {shown(value)}")
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    kind = raw.get("model_type")
    if kind not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"model_type {shown(kind)} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    required: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1, 1.0),
        "quantization_config": (),
        "quantization": (),
    }
    if kind == "qwen2":
        required["use_sliding_window"] = (False,)
    for name, allowed in required.items():
        _refuse_all_but(name, raw.get(name), allowed)
    _refuse_all_but("partial_rotary_factor", rotary_settings(raw).get("partial_rotary_factor"), (1, 1.0))


def _refuse_all_but(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if value is None or value in allowed:
        return
    only = f"; supported: {', '.join(map(repr, allowed))}" if allowed else ""
    raise ValueError(f"{name} {shown(value)} is not supported{only}")


def _windows(raw: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that do not have it."""
    kinds = _layer_types(raw, layers)
    if raw["model_type"] != "mistral":
        # Llama has no window; Qwen2's configs name one and switch it off.
        return None, ()
    window = _field(raw, "sliding_window", int, None)
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    if window is None and len(full) < len(kinds):
        raise ValueError("layer_types has sliding_attention, but sliding_window is null")
    return (None, ()) if kinds and len(full) == len(kinds) else (window, full)


def _layer_types(raw: Mapping[str, Any], layers: int) -> list[str]:
    """The kind of each layer, or an empty list where the config does not say."""
    kinds = raw.get("layer_types")
    if kinds is None:
        return []
    if not isinstance(kinds, (list, tuple)) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"layer_types must be a list of strings, not {shown(kinds)}")
    # Older files call full attention just that.
    kinds = ["full_attention" if kind == "attention" else kind for kind in kinds]
    allowed = ["full_attention"] + ["sliding_attention"] * (raw["model_type"] == "mistral")
    for kind in kinds:
        if kind not in allowed:
            raise ValueError(f"layer_types {shown(kind)} is not supported; supported: {', '.join(allowed)}")
    if len(kinds) != layers:
        raise ValueError(f"layer_types must name the {shown(layers)} layers' kinds, not {len(kinds)} of them")
    return kinds


def _rope_scaling(raw: Mapping[str, Any], positions: int) -> RopeScaling | None:
    settings = rotary_settings(raw)
    kind = rotary_type(settings)
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=_field(settings, "factor", float))
    if kind == "llama3":
        return Llama3Scaling(
            factor=_field(settings, "factor", float),
            low_freq_factor=_field(settings, "low_freq_factor", float),
            high_freq_factor=_field(settings, "high_freq_factor", float),
            original_max_position=original_positions(raw, settings, positions),
        )
    raise ValueError(f"rope_scaling {shown(kind)} is not supported; supported: default, linear, llama3")
