"""The sizes of a model that determine its memory, from its `config.json`."""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

from jaxkv import catalog
from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_header import planned_fields
from jaxkv.checkpoints.hf_folder import closest, is_extended, read_json, shown, trained_context
from jaxkv.config import DTYPES
from jaxkv.planner.architectures import ARCHITECTURES, Architecture, layer_windows
from jaxkv.planner.encoders import TIED, encoder_weights
from jaxkv.planner.quantization import beside, quantization
from jaxkv.planner.stored import safetensors_bytes
from jaxkv.planner.weights import Sizes, mlp_width, sizes

_TEXT_PARTS = ("text_config", "llm_config", "language_config")


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
      num_parameters, active_parameters: weights, and those that a token uses: of embeddings the output
        projection only, of experts the chosen ones.
      routed_parameters: weights of experts that a router chooses from.
      embedding_parameters: weights of the embedding, the output projection, positions and encoders of images
        or sound, which are stored in 16 bits.
      quantization: storage of the published weights, as `quant_method`; None is `dtype`.
      quantized_bits: bits per quantized weight, including scales; None if the config does not say.
      quantized_parts: the quantized weights: "all", "linear" (all but embeddings), or "experts".
      stored_bytes: bytes of the weight files beside the config, if they exist.
      layer_sizes: KV heads and head_dim of each layer, where layers differ; the fields above are the first's.
      state_elements: elements of the states of fixed size of one sequence.
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
    layer_sizes: tuple[tuple[int, int], ...] | None = None
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

    @property
    def layer_elements(self) -> tuple[int, ...]:
        """Elements per token of each layer."""
        if self.layer_sizes is None:
            return (self.elements_per_token,) * len(self.windows)
        return tuple(2 * heads * head_dim for heads, head_dim in self.layer_sizes)

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
        outer, found, stored = _open(source)
        raw, notes = _text_part(outer)
        kind = raw.get("model_type")
        architecture = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
        if kind is None:
            raise ValueError("field 'model_type' is missing")
        if architecture is None:
            raise ValueError(f"model_type {shown(kind)} is not known; known: {closest(kind, ARCHITECTURES)}")
        raw = _complete(raw, architecture, nested=raw is not outer)
        fields = Fields(raw)
        size, vocab = _sizes(fields, architecture), fields.integer("vocab_size")
        layers = architecture.layers(fields, size)
        windows = tuple(layer_windows(fields, architecture, size.layers))
        if not windows:
            raise ValueError("no layer has K and V; there is no cache to plan")
        said = Fields({**raw, **outer})
        tied = said.flag("tie_word_embeddings", TIED.get(str(outer.get("model_type")), architecture.tied))
        if tied != said.flag("tie_word_embeddings", architecture.tied):
            notes += ("tie_word_embeddings is not said: the output projection is taken to be the embedding",)
        context = fields.integer(
            "max_position_embeddings", "n_positions", "max_seq_len", default=architecture.context
        )
        width = fields.integer(architecture.embedded, default=size.hidden)
        table = vocab * width
        embeddings = (1 if tied else 2) * table + fields.flag(*architecture.head_bias) * vocab
        embeddings += architecture.extra_rows * size.hidden
        embeddings += architecture.positions * (context + architecture.extra_positions) * size.hidden
        encoders, uncounted = encoder_weights(outer, size.hidden)
        more, rest = (0, 0) if architecture.extra is None else architecture.extra(fields, size)
        around = rest + architecture.final_norm * size.hidden
        around += 2 * width * size.hidden if width != size.hidden else 0
        each = None if architecture.layer_sizes is None else architecture.layer_sizes(fields, size)
        latent = architecture.latent and fields.integer("kv_lora_rank") + fields.integer("qk_rope_head_dim")
        if latent and architecture.indexed:
            latent += fields.integer("index_head_dim")
        notes += uncounted + ((architecture.note,) if architecture.note else ())
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
            num_kv_heads=1 if latent else size.kv_heads if each is None else each[0][0],
            head_dim=latent or (size.head_dim if each is None else each[0][1]),
            is_latent=bool(latent),
            has_sinks=architecture.sinks,
            hidden_size=size.hidden,
            vocab_size=vocab,
            mlp_width=mlp_width(fields, size.hidden),
            windows=windows,
            layer_sizes=None if each is None or len(set(each)) == 1 else tuple(each),
            state_elements=0 if architecture.state is None else architecture.state(fields),
            max_context=trained_context(raw, context),
            is_extended=is_extended(raw, context),
            dtype=_dtype(raw) or _dtype(outer),
            num_parameters=embeddings + more + encoders + around + sum(layer.total for layer in layers),
            active_parameters=table + around + sum(layer.active or layer.total for layer in layers),
            routed_parameters=sum(layer.routed for layer in layers),
            embedding_parameters=embeddings + more + encoders,
            quantization=stored_as.method,
            quantized_bits=stored_as.bits,
            quantized_parts=stored_as.parts,
            stored_bytes=stored,
            notes=notes,
        )


def _text_part(outer: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The part of a config that describes the language model, with notes on the others."""
    for name in _TEXT_PARTS:
        if isinstance(outer.get(name), Mapping):
            return outer[name], (f"K and V are those of the text part of {shown(outer.get('model_type'))}",)
    return outer, ()


def _complete(raw: Mapping[str, Any], architecture: Architecture, *, nested: bool) -> dict[str, Any]:
    """A config with the usual names of its fields, and the defaults of those that it leaves out."""
    named = {ours: raw[theirs] for theirs, ours in architecture.renamed.items() if theirs in raw}
    absent = catalog.defaults().get(raw["model_type"], {})
    if not nested:
        absent = {name: value for name, value in absent.items() if name not in architecture.needed}
    return {**absent, **named, **raw}


def _sizes(fields: Fields, architecture: Architecture) -> Sizes:
    kv_heads = None if architecture.kv_heads is None else architecture.kv_heads(fields)
    layers = None if architecture.kinds is None else len(architecture.kinds(fields))
    return sizes(fields, latent=architecture.latent, kv_heads=kv_heads, layers=layers)


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

        return planned_fields(GGUFFile(path)), path.stem, path.stat().st_size
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
