"""What a model's `config.json` says about memory."""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

from jaxkv import catalog
from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_header import config_fields
from jaxkv.checkpoints.hf_folder import is_extended, read_json, shown, trained_context, with_defaults
from jaxkv.config import DTYPES
from jaxkv.planner.architectures import ARCHITECTURES, layer_windows, mlp_width, sizes
from jaxkv.planner.stored import safetensors_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model that decide how much memory it takes.

    Attributes:
      name: for people.
      architecture: the `model_type`.
      num_layers: that keep K and V.
      num_q_heads, num_kv_heads, head_dim: of attention. With MLA: one head of `kv_lora_rank +
        qk_rope_head_dim` elements, kept once, whatever `num_key_value_heads` says.
      is_latent: MLA: a token keeps one latent vector, not K and V.
      has_sinks: attention has learned sinks; they keep no tokens.
      hidden_size, vocab_size: widths.
      mlp_width: features of the MLP that a token meets, of all its experts together.
      windows: how many of the latest tokens each layer keeps; None is all.
      max_context: tokens it was trained on, or that its rotary scaling extends this to.
      is_extended: whether it is the rotary scaling that makes `max_context` as long as it is.
      dtype: of its weights as published, None where the config does not say.
      num_parameters, active_parameters: weights, and those a token meets (fewer with experts).
      routed_parameters: those of experts that a router chooses from.
      embedding_parameters: those of the embedding, the output projection and positions.
      quantization: how the published weights are stored, as `quant_method`; None: in `dtype`.
      quantized_bits: of a weight so stored, the scales of its group counted in; None where the config does
        not say.
      stored_bytes: of the weights' files, where they lie beside the config.
      notes: what a reader of the numbers should know.
    """

    name: str
    architecture: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    is_latent: bool = False
    has_sinks: bool = False
    hidden_size: int
    vocab_size: int
    mlp_width: int
    windows: tuple[int | None, ...]
    max_context: int
    is_extended: bool = False
    dtype: str | None = None
    num_parameters: int
    active_parameters: int
    routed_parameters: int = 0
    embedding_parameters: int = 0
    quantization: str | None = None
    quantized_bits: float | None = None
    stored_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def other_parameters(self) -> int:
        """Those that are neither embeddings nor experts."""
        return self.num_parameters - self.embedding_parameters - self.routed_parameters

    @property
    def elements_per_token(self) -> int:
        """Numbers that one layer keeps of one token: 2 x KV heads x head_dim, or the latent vector."""
        return (1 if self.is_latent else 2) * self.num_kv_heads * self.head_dim

    @classmethod
    def from_config(
        cls, source: Mapping[str, Any] | str | PathLike[str] | Any, name: str | None = None
    ) -> Self:
        """Reads a Hugging Face config.

        Args:
          source: its contents, the path of a `config.json` or of its folder (whose safetensors files are then
            counted), the path of a GGUF file, the name of a model in `configs/models`, or an object with
            `to_dict()` such as a `PretrainedConfig`.
          name: for people. Default: what `source` is called.

        Raises:
          ValueError: when it cannot be read, a field is missing or absurd, or the architecture is not known.

        Example:
          >>> ModelShape.from_config("llama-3.1-8b").elements_per_token
          2048
        """
        raw, found, stored = _open(source)
        outer, notes = raw, ()
        if isinstance(raw.get("text_config"), Mapping):
            raw = raw["text_config"]
            notes = (f"only the text part of {shown(outer.get('model_type'))} is counted",)
        raw = with_defaults(raw)
        kind = raw.get("model_type")
        architecture = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
        if architecture is None:
            raise ValueError(
                f"model_type {shown(kind)} is not known; known: {', '.join(sorted(ARCHITECTURES))}"
            )
        fields = Fields(raw)
        size, vocab = sizes(fields, latent=architecture.latent), fields.integer("vocab_size")
        layers = architecture.layers(fields, size)
        tied = Fields({**outer, **raw}).flag("tie_word_embeddings", architecture.tied)
        context = fields.integer(
            "max_position_embeddings", "n_positions", default=2048 if kind == "falcon" else None
        )
        embeddings = (1 if tied else 2) * vocab * size.hidden + architecture.positions * context * size.hidden
        around = embeddings + architecture.final_norm * size.hidden
        latent = architecture.latent and fields.integer("kv_lora_rank") + fields.integer("qk_rope_head_dim")
        if architecture.latent:
            notes += (
                "MLA keeps one latent vector a token; jaxkv's pool holds K and V, so it has no CacheConfig",
            )
        quantization, bits = _quantization(outer)
        if quantization is None:
            quantization, bits = _quantization(raw)
        return cls(
            name=name or found or str(kind),
            architecture=str(kind),
            num_layers=size.layers,
            num_q_heads=size.q_heads,
            num_kv_heads=1 if latent else size.kv_heads,
            head_dim=latent or size.head_dim,
            is_latent=bool(latent),
            has_sinks=architecture.sinks,
            hidden_size=size.hidden,
            vocab_size=vocab,
            mlp_width=mlp_width(fields, size.hidden),
            windows=tuple(layer_windows(fields, architecture, size.layers)),
            max_context=trained_context(raw, context),
            is_extended=is_extended(raw, context),
            dtype=_dtype(raw) or _dtype(outer),
            num_parameters=around + sum(layer.total for layer in layers),
            active_parameters=around + sum(layer.active or layer.total for layer in layers),
            routed_parameters=sum(layer.routed for layer in layers),
            embedding_parameters=embeddings,
            quantization=quantization,
            quantized_bits=bits,
            stored_bytes=stored,
            notes=notes,
        )


def _open(source: Any) -> tuple[Mapping[str, Any], str | None, int | None]:
    """The config, its name, and the bytes of the weights beside it."""
    if hasattr(source, "to_dict"):
        source = source.to_dict()
    if isinstance(source, Mapping):
        return source, None, None
    if not isinstance(source, (str, PathLike)):
        raise ValueError(f"a config is a mapping, a path or a PretrainedConfig, not {type(source).__name__}")
    path = Path(source)
    if not path.exists():
        try:
            path = catalog.find("models", str(source))
        except ValueError as error:
            raise ValueError(f"{error}; nor is it a file or folder") from None
    if path.suffix == ".gguf":
        from jaxkv.checkpoints.gguf_file import GGUFFile  # its reader is an extra

        return config_fields(GGUFFile(path)), path.stem, path.stat().st_size
    folder = path if path.is_dir() else path.parent
    named = path.stem if path.is_file() and path.stem != "config" else folder.resolve().name
    # Beside another file's name the weights may be another model's.
    own = path.is_dir() or path.name == "config.json"
    return read_json(path), named, safetensors_bytes(folder) if own else None


def _dtype(raw: Mapping[str, Any]) -> str | None:
    value = raw.get("dtype", raw.get("torch_dtype"))
    if value is None:
        return None
    name = "" if isinstance(value, int) else str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {shown(value)} is not known; known: {', '.join(DTYPES)}")
    return name


def _quantization(raw: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """How weights are stored, and bits of each where the config gives them for all weights alike."""
    for field in ("quantization_config", "quantization"):
        options = raw.get(field)
        if options is None:
            continue
        if not isinstance(options, Mapping):
            raise ValueError(f"{field} must be an object, not {shown(options)}")
        method = options.get("quant_method")
        if method is not None and not isinstance(method, str):
            raise ValueError(f"{field}'s quant_method must be a string, not {shown(method)}")
        return (method, None) if method else (field, _mlx_bits(field, options))
    return None, None


def _mlx_bits(field: str, options: Mapping[str, Any]) -> float | None:
    """Bits of a weight as MLX stores it; None where layers differ, or another format is meant.

    A group of weights shares a scale and a bias of 16 bits each. The embedding is stored likewise.
    """
    if any(isinstance(value, Mapping) or value is False for value in options.values()):
        return None
    if "bits" not in options or "group_size" not in options or options.get("mode", "affine") != "affine":
        return None
    numbers = Fields(options)
    for name in ("bits", "group_size"):
        try:
            numbers.integer(name)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    if options["bits"] > 8:
        raise ValueError(f"{field}: bits must be an integer from 1 to 8, not {shown(options['bits'])}")
    return options["bits"] + 2 * 16 / options["group_size"]
