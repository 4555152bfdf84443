"""The static sizes of a Llama-family model, and how to read them from a `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

from jaxkv.arguments import whole
from jaxkv.checkpoints.fields import Fields, most
from jaxkv.checkpoints.hf_folder import (
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The static sizes and options of one Llama-family model; hashable, so it can be a static argument.

    Attributes:
      vocab_size: tokens of the vocabulary.
      hidden_size: width of the residual stream, in features.
      num_layers: transformer blocks.
      num_q_heads: query heads.
      num_kv_heads: key and value heads; divides `num_q_heads`.
      head_dim: features of one head; even.
      intermediate_size: width of the MLP, in features.
      rms_norm_eps: added to the mean square before its root.
      rope_theta: the base of the rotary frequencies.
      rope_pairing: which features are rotated as a pair; see `jaxkv.rope.rotate`.
      rope_scaling: how the frequencies are scaled, or None.
      qkv_bias: whether the Q, K and V projections add a bias (Qwen2).
      tied_embeddings: whether the output projection is the embedding table.
      window: latest tokens that a token attends to, itself included; None is all.
      full_attention_layers: layers that attend to all tokens despite the window, in order.
      max_context: tokens of context that the model supports, including rotary scaling.

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
        for name, hf_name in _HF_NAMES.items():
            value, limit = getattr(self, name), most(hf_name)
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
        """The window of each layer, in tokens; None is all."""
        full = set(self.full_attention_layers)
        return tuple(None if layer in full else self.window for layer in range(self.num_layers))

    @property
    def q_features(self) -> int:
        """Features of all query heads together."""
        return self.num_q_heads * self.head_dim

    @property
    def kv_features(self) -> int:
        """Features of all key heads together; the same for all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def rope(self) -> Rope:
        """How keys are rotated by their positions."""
        return Rope.of(self.head_dim, self.rope_theta, self.rope_scaling, self.rope_pairing)

    def cache_config(self, **options: Any) -> CacheConfig:
        """A `jaxkv.CacheConfig` for this model; `options` are its other arguments.

        Raises:
          ValueError: as `CacheConfig` does.
        """
        sizes = dict(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            layer_windows=self.windows,
        )
        return CacheConfig(**{**sizes, **options})  # type: ignore[arg-type]

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | PathLike[str]) -> Self:
        """Reads a Hugging Face `config.json`, given as its contents, its path or its folder.

        Raises:
          ValueError: if the file cannot be read, the architecture or a feature is not supported, or a field
            is missing or out of range; the message names it.
        """
        raw = with_defaults(source if isinstance(source, Mapping) else read_json(Path(source)))
        _refuse_unsupported(raw)
        fields = Fields(raw)
        hidden, q_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        layers, positions = fields.integer("num_hidden_layers"), fields.integer("max_position_embeddings")
        window, full_attention_layers = _windows(fields, layers)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            num_layers=layers,
            num_q_heads=q_heads,
            num_kv_heads=fields.integer("num_key_value_heads", default=q_heads),
            head_dim=fields.integer("head_dim", default=hidden // q_heads),
            intermediate_size=fields.integer("intermediate_size"),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=Fields(rotary_settings(raw)).number("rope_theta", fields.number("rope_theta", 1e4)),
            rope_scaling=_rope_scaling(raw, positions),
            qkv_bias=raw["model_type"] == "qwen2",
            tied_embeddings=fields.flag("tie_word_embeddings", False),
            window=window,
            full_attention_layers=full_attention_layers,
            max_context=trained_context(raw, positions),
        )


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


def _windows(fields: Fields, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers without it."""
    has_window = fields.raw["model_type"] == "mistral"
    kinds = fields.layer_types(layers) or []
    allowed = ["full_attention"] + ["sliding_attention"] * has_window
    for kind in kinds:
        if kind not in allowed:
            raise ValueError(f"layer_types {shown(kind)} is not supported; supported: {', '.join(allowed)}")
    if not has_window:
        # Llama has no window; Qwen2's configs have one that is switched off.
        return None, ()
    window = fields.optional("sliding_window")
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    if window is None and len(full) < len(kinds):
        raise ValueError("layer_types has sliding_attention, but sliding_window is null")
    return (None, ()) if kinds and len(full) == len(kinds) else (window, full)


def _rope_scaling(raw: Mapping[str, Any], positions: int) -> RopeScaling | None:
    settings = rotary_settings(raw)
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
