"""The sizes of a model that determine its memory, from its `config.json`."""

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
from jaxkv.planner.architectures import ARCHITECTURES, layer_windows
from jaxkv.planner.quantization import beside, quantization
from jaxkv.planner.stored import safetensors_bytes
from jaxkv.planner.weights import mlp_width, sizes

# A nested config has only the fields that differ from the defaults of its class.
_WHERE_ABSENT_IN_A_PART: dict[str, dict[str, int]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    },
    "gemma3_text": {"vocab_size": 262208, "max_position_embeddings": 131072},
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model that determine its memory.

    Attributes:
      name: for display.
      architecture: the `model_type`.
      num_layers: layers with K and V.
      num_q_heads, num_kv_heads, head_dim: of attention. With MLA one KV head of `kv_lora_rank +
        qk_rope_head_dim` elements, stored once; `num_key_value_heads` is ignored.
      is_latent: MLA; a token has one latent vector, not K and V.
      has_sinks: whether attention has learned sinks, which take no token slots.
      hidden_size, vocab_size: features, tokens.
      mlp_width: MLP features that a token uses, in all its experts.
      windows: latest tokens that each layer attends to; None is all.
      max_context: tokens that it was trained on, or its rotary scaling extends that to.
      is_extended: whether rotary scaling extends `max_context`.
      dtype: of the published weights; None if the config does not say.
      num_parameters, active_parameters: weights, and those that a token uses (fewer with experts).
      routed_parameters: weights of experts that a router chooses from.
      embedding_parameters: weights of the embedding, the output projection and positions.
      quantization: storage of the published weights, as `quant_method`; None is `dtype`.
      quantized_bits: bits per quantized weight, including scales; None if the config does not say.
      quantized_parts: the quantized weights: "all", "linear" (all but embeddings), or "experts".
      stored_bytes: bytes of the weight files beside the config, if they exist.
      state_elements: elements of the states of one sequence, in layers that keep no K and V.
      notes: caveats for a reader of the plan.
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
    quantized_parts: str = "linear"
    stored_bytes: int | None = None
    state_elements: int = 0
    notes: tuple[str, ...] = ()

    @property
    def other_parameters(self) -> int:
        """Weights of neither embeddings nor experts."""
        return self.num_parameters - self.embedding_parameters - self.routed_parameters

    @property
    def elements_per_token(self) -> int:
        """Elements per token and layer: 2 x KV heads x head_dim, or the latent vector's."""
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
          name: for display. Default: the name of `source`.

        Raises:
          ValueError: if it cannot be read, a field is missing or invalid, or the architecture is unknown.

        Example:
          >>> ModelShape.from_config("llama-3.1-8b").elements_per_token
          2048
        """
        raw, found, stored = _open(source)
        outer, notes = raw, ()
        if isinstance(raw.get("text_config"), Mapping):
            raw = raw["text_config"]
            raw = {**_WHERE_ABSENT_IN_A_PART.get(str(raw.get("model_type")), {}), **raw}
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
        windows = tuple(layer_windows(fields, architecture, size.layers))
        if not windows:
            raise ValueError("no layer has K and V; there is no cache to plan")
        tied = Fields({**outer, **raw}).flag("tie_word_embeddings", architecture.tied)
        context = fields.integer(
            "max_position_embeddings",
            "n_positions",
            "max_seq_len",
            default=2048 if kind in ("falcon", "bloom") else None,
        )
        embeddings = (1 if tied else 2) * vocab * size.hidden + architecture.head_bias * vocab
        embeddings += architecture.positions * (context + architecture.extra_positions) * size.hidden
        around = embeddings + architecture.final_norm * size.hidden
        latent = architecture.latent and fields.integer("kv_lora_rank") + fields.integer("qk_rope_head_dim")
        if latent and architecture.indexed:
            latent += fields.integer("index_head_dim")
        if architecture.latent:
            notes += (
                "MLA has one latent vector per token; jaxkv stores K and V, so there is no CacheConfig",
            )
        stored_as = quantization(outer)
        if stored_as.method is None:
            stored_as = quantization(raw)
        return cls(
            name=name or found or str(kind),
            architecture=str(kind),
            num_layers=len(windows),
            num_q_heads=size.q_heads,
            num_kv_heads=1 if latent else size.kv_heads,
            head_dim=latent or size.head_dim,
            is_latent=bool(latent),
            has_sinks=architecture.sinks,
            hidden_size=size.hidden,
            vocab_size=vocab,
            mlp_width=mlp_width(fields, size.hidden),
            windows=windows,
            state_elements=0 if architecture.state is None else architecture.state(fields, size.layers),
            max_context=trained_context(raw, context),
            is_extended=is_extended(raw, context),
            dtype=_dtype(raw) or _dtype(outer),
            num_parameters=around + sum(layer.total for layer in layers),
            active_parameters=around + sum(layer.active or layer.total for layer in layers),
            routed_parameters=sum(layer.routed for layer in layers),
            embedding_parameters=embeddings,
            quantization=stored_as.method,
            quantized_bits=stored_as.bits,
            quantized_parts=stored_as.parts,
            stored_bytes=stored,
            notes=notes,
        )


def _open(source: Any) -> tuple[Mapping[str, Any], str | None, int | None]:
    """The config, its name, and the bytes of the weight files beside it."""
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
        from jaxkv.checkpoints.gguf_file import GGUFFile  # needs an optional dependency

        return config_fields(GGUFFile(path)), path.stem, path.stat().st_size
    folder = path if path.is_dir() else path.parent
    named = path.stem if path.is_file() and path.stem != "config" else folder.resolve().name
    # Beside a config of another name, the weights may be another model's.
    own = path.is_dir() or path.name == "config.json"
    if not own:
        return read_json(path), named, None
    return {**beside(folder), **read_json(path)}, named, safetensors_bytes(folder)


def _dtype(raw: Mapping[str, Any]) -> str | None:
    value = raw.get("dtype", raw.get("torch_dtype"))
    if value is None:
        return None
    name = "" if isinstance(value, int) else str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {shown(value)} is not known; known: {', '.join(DTYPES)}")
    return name
