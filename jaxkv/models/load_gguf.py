"""Loading a GGUF file: the metadata says the sizes, the tensors are dequantized one by one."""

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jax.typing import DTypeLike

from jaxkv.models.config import ModelConfig
from jaxkv.models.llama import Llama
from jaxkv.models.rope import FrequencyFactors, LinearScaling, RopeScaling
from jaxkv.models.weights import ModelLoadError, Progress, TensorNames, build_model

# GGUF calls Mistral's architecture "llama" too.
GGUF_ARCHITECTURES = ("llama", "qwen2")

NAMES = TensorNames(
    embedding="token_embd.weight",
    final_norm="output_norm.weight",
    unembedding="output.weight",
    layer="blk.{layer}.",
    attention_norm="attn_norm.weight",
    qkv=("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    qkv_bias=("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    out="attn_output.weight",
    mlp_norm="ffn_norm.weight",
    gate_up=("ffn_gate.weight", "ffn_up.weight"),
    down="ffn_down.weight",
)
ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """The metadata and the tensors of one GGUF file.

    Attributes:
      path: of the file.
      shapes: of every tensor, outermost dimension first.

    Raises:
      ModelLoadError: when it is not a GGUF file, or ends too early.
    """

    def __init__(self, path: Path):
        self.path = path
        reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self._fields = reader.fields

    def get(self, name: str, default: Any = None) -> Any:
        """One metadata field, or `default` where the file has none."""
        field = self._fields.get(name)
        if field is None:
            return default
        try:
            return field.contents()
        except Exception as error:
            raise ModelLoadError(f"{self.path}: field {name!r} is damaged: {error}") from None

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantized: float32, or float16 where the file has that."""
        tensor = self._tensors[name]
        try:
            if tensor.tensor_type.name in ("F32", "F16", "F64"):
                return tensor.data
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ModelLoadError(
                f"{self.path}: tensor {name!r} is of type {tensor.tensor_type.name}, "
                "which cannot be dequantized"
            ) from None

    def num_bytes(self, name: str) -> int:
        """Bytes of one tensor in the file."""
        return int(self._tensors[name].n_bytes)


class _Reader(gguf.GGUFReader):
    """Reads a header three times faster: slices of a plain array cost less than of a memory map."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)


def _open(path: Path) -> gguf.GGUFReader:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise ModelLoadError(f"{path}: is not a GGUF file")
    try:
        # Sizes of a damaged header overflow before the reader notices that the file is too short.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)
            return _Reader(path)
    except Exception as error:
        # The reader has no errors of its own: whatever it trips over, the file is not whole.
        raise ModelLoadError(f"{path}: is truncated or damaged: {error}") from None


def load_gguf(
    file: GGUFFile, *, dtype: DTypeLike, progress: Progress | None = None
) -> tuple[Llama, ModelConfig]:
    """Reads the model out of an opened file.

    Args:
      file: the GGUF file.
      dtype: of the model's matrices, whatever the file's are.
      progress: told how far reading is.

    Raises:
      ModelLoadError: naming the file and what is wrong with it.
    """
    try:
        config = gguf_config(file)
    except ModelLoadError:
        raise
    except ValueError as error:
        raise ModelLoadError(f"{file.path}: {error}") from None
    model = build_model(
        config, file, NAMES, dtype=dtype, ignored=lambda name: name == ROPE_FACTORS, progress=progress
    )
    return model, config


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The model's sizes from a file's metadata.

    Raises:
      ValueError: for an architecture or feature that is not supported, or a bad field; named.
    """
    architecture = file.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(GGUF_ARCHITECTURES)}"
        )

    def field(name: str, kind: type, default: Any = None) -> Any:
        value = file.get(f"{architecture}.{name}", default)
        if value is None:
            raise ValueError(f"metadata has no field '{architecture}.{name}'")
        if kind is int and isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"'{architecture}.{name}' must be a {kind.__name__}, not {value!r}")
        return value

    for name in ("expert_count", "attention.sliding_window"):
        if field(name, int, 0):
            raise ValueError(f"'{architecture}.{name}' = {field(name, int)} is not supported")
    hidden, q_heads = field("embedding_length", int), field("attention.head_count", int)
    if q_heads < 1:
        raise ValueError(f"'{architecture}.attention.head_count' must be positive, not {q_heads}")
    head_dim = field("attention.key_length", int, hidden // q_heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if field(name, int, head_dim) != head_dim:
            raise ValueError(f"'{architecture}.{name}' must be the head's {head_dim}, not {field(name, int)}")
    return ModelConfig(
        vocab_size=file.shapes.get(NAMES.embedding, (field("vocab_size", int, 0),))[0],
        hidden_size=hidden,
        num_layers=field("block_count", int),
        num_q_heads=q_heads,
        num_kv_heads=field("attention.head_count_kv", int, q_heads),
        head_dim=head_dim,
        intermediate_size=field("feed_forward_length", int),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon", float),
        rope_theta=field("rope.freq_base", float, 10000.0),
        # Llama's Q and K were permuted when the file was written; Qwen2's were not.
        rope_pairing="interleaved" if architecture == "llama" else "half",
        rope_scaling=_rope_scaling(file, architecture),
        qkv_bias=architecture == "qwen2",
        tied_embeddings=NAMES.unembedding not in file.shapes,
        max_context=field("context_length", int),
    )


def _rope_scaling(file: GGUFFile, architecture: str) -> RopeScaling | None:
    kind = file.get(f"{architecture}.rope.scaling.type", "none")
    factor = file.get(f"{architecture}.rope.scaling.factor", 0.0)
    if kind not in ("none", "linear"):
        raise ValueError(f"rope scaling {kind!r} is not supported; supported: none, linear")
    if ROPE_FACTORS in file.shapes:
        factors = np.asarray(file.read(ROPE_FACTORS), np.float32)
        if not np.all(np.isfinite(factors)) or not np.all(factors > 0):
            raise ValueError(f"tensor {ROPE_FACTORS!r} must hold positive numbers")
        return FrequencyFactors(factors=tuple(factors.tolist()))
    if kind == "linear":
        if not isinstance(factor, float) or not 0.0 < factor < float("inf"):
            raise ValueError(f"'{architecture}.rope.scaling.factor' must be positive, not {factor!r}")
        return LinearScaling(factor=factor)
    return None
