"""What a Llama-family model is, as static numbers, and reading them from a `config.json`."""

import dataclasses
import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

from jaxkv.arguments import whole
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
    "max_context": 2**27,
    "window": 2**27,
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
      max_context: tokens of context the model was trained for.

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
    max_context: int

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            number = whole(value)
            if number is None or not 1 <= number <= limit:
                raise ValueError(f"{name} must be an integer from 1 to {limit}, not {value!r}")
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
        raw = source if isinstance(source, Mapping) else _read_json(Path(source))
        _refuse_unsupported(raw)
        hidden, q_heads = _field(raw, "hidden_size", int), _field(raw, "num_attention_heads", int)
        if hidden < 1 or q_heads < 1:
            name, value = ("hidden_size", hidden) if hidden < 1 else ("num_attention_heads", q_heads)
            raise ValueError(f"{name} must be positive, not {value}")
        return cls(
            vocab_size=_field(raw, "vocab_size", int),
            hidden_size=hidden,
            num_layers=_field(raw, "num_hidden_layers", int),
            num_q_heads=q_heads,
            num_kv_heads=_field(raw, "num_key_value_heads", int, q_heads),
            head_dim=_field(raw, "head_dim", int, hidden // q_heads),
            intermediate_size=_field(raw, "intermediate_size", int),
            rms_norm_eps=_field(raw, "rms_norm_eps", float, 1e-6),
            rope_theta=_rope_field(raw, "rope_theta", 10000.0),
            rope_scaling=_rope_scaling(raw),
            qkv_bias=raw["model_type"] == "qwen2",
            tied_embeddings=_field(raw, "tie_word_embeddings", bool, False),
            window=_window(raw),
            max_context=_field(raw, "max_position_embeddings", int),
        )


def _read_json(path: Path) -> Mapping[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(raw).__name__}")
    return raw


_MISSING = object()
_KINDS = {int: "an integer", float: "a number", bool: "true or false"}


def _field(raw: Mapping[str, Any], name: str, kind: type, default: Any = _MISSING) -> Any:
    value = raw.get(name)
    if value is None:
        if default is _MISSING:
            raise ValueError(f"field {name!r} is missing")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be {_KINDS[kind]}, not {value!r}")
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    kind = raw.get("model_type")
    if kind not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"model_type {kind!r} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    required: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1, 1.0),
        "quantization_config": (),
    }
    if kind == "qwen2":
        required["use_sliding_window"] = (False,)
    for name, allowed in required.items():
        value = raw.get(name)
        if value is not None and value not in allowed:
            only = f"; supported: {', '.join(map(repr, allowed))}" if allowed else ""
            raise ValueError(f"{name} {value!r} is not supported{only}")
    unusual = set(raw.get("layer_types") or ()) - {"full_attention"}
    if unusual and kind != "mistral":
        raise ValueError(f"layer_types {sorted(unusual)} are not supported")


def _window(raw: Mapping[str, Any]) -> int | None:
    # Llama has no window; Qwen2's configs name one and switch it off.
    return _field(raw, "sliding_window", int, None) if raw["model_type"] == "mistral" else None


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings, from where version 5 of `transformers` or an earlier one puts them."""
    for name in ("rope_parameters", "rope_scaling"):
        value = raw.get(name)
        if value is not None:
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} must be an object, not {value!r}")
            return value
    return {}


def _rope_field(raw: Mapping[str, Any], name: str, default: float) -> float:
    return _field(_rope(raw), name, float, _field(raw, name, float, default))


def _rope_scaling(raw: Mapping[str, Any]) -> RopeScaling | None:
    rope = _rope(raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=_field(rope, "factor", float))
    if kind == "llama3":
        return Llama3Scaling(
            factor=_field(rope, "factor", float),
            low_freq_factor=_field(rope, "low_freq_factor", float),
            high_freq_factor=_field(rope, "high_freq_factor", float),
            original_max_position=_field(rope, "original_max_position_embeddings", int),
        )
    raise ValueError(f"rope_scaling {kind!r} is not supported; supported: default, linear, llama3")
