"""Loading a GGUF file: the metadata says the sizes, the tensors are dequantized one by one."""

import functools
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.checkpoints.hf_folder import shown, trained_context
from jaxkv.errors import ModelLoadError
from jaxkv.models.config import ModelConfig
from jaxkv.models.llama import Llama
from jaxkv.models.weights import Progress, TensorNames, build_model
from jaxkv.rope import FrequencyFactors, LinearScaling, RopeScaling

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
    config = gguf_config(file)
    model = build_model(
        config, file, NAMES, dtype=dtype, ignored=lambda name: name == ROPE_FACTORS, progress=progress
    )
    return model, config


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The model's sizes from a file's metadata.

    Raises:
      ModelLoadError: for an architecture or feature that is not supported, or a bad field; named.
    """
    architecture = file.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path}: architecture {shown(architecture)} is not supported; "
            f"supported: {', '.join(GGUF_ARCHITECTURES)}"
        )
    number = functools.partial(_number, file, architecture)
    _refuse_unsupported(file, architecture)
    hidden, q_heads = number("embedding_length", int), number("attention.head_count", int)
    head_dim = number("attention.key_length", int, hidden // max(q_heads, 1))
    for name in ("rope.dimension_count", "attention.value_length"):
        if number(name, int, head_dim) != head_dim:
            raise ModelLoadError(
                f"{file.path}: field '{architecture}.{name}' = {number(name, int)} is not supported; "
                f"supported: the head's {head_dim}"
            )
    try:
        return ModelConfig(
            vocab_size=file.shapes.get(NAMES.embedding, (0,))[0],
            hidden_size=hidden,
            num_layers=number("block_count", int),
            num_q_heads=q_heads,
            num_kv_heads=number("attention.head_count_kv", int, q_heads),
            head_dim=head_dim,
            intermediate_size=number("feed_forward_length", int),
            rms_norm_eps=number("attention.layer_norm_rms_epsilon", float),
            rope_theta=number("rope.freq_base", float, 10000.0),
            # Llama's Q and K were permuted when the file was written; Qwen2's were not.
            rope_pairing="interleaved" if architecture == "llama" else "half",
            rope_scaling=_rope_scaling(file, architecture),
            qkv_bias=architecture == "qwen2",
            tied_embeddings=NAMES.unembedding not in file.shapes,
            max_context=_trained_context(file, architecture),
        )
    except ModelLoadError:
        raise
    except ValueError as error:
        raise ModelLoadError(f"{file.path}: {error}") from None


def _number(file: GGUFFile, architecture: str, name: str, kind: Any, default: float | None = None) -> Any:
    return file.number(f"{architecture}.{name}", kind, default)


def _refuse_unsupported(file: GGUFFile, architecture: str) -> None:
    parts = file.number("split.count", int, 1)
    if parts > 1:
        raise ModelLoadError(f"{file.path}: is one of {parts} parts; merge them with gguf-split first")
    if NAMES.embedding not in file.shapes:
        raise ModelLoadError(f"{file.path}: tensor {NAMES.embedding!r} is missing")
    for name in ("expert_count", "attention.sliding_window"):
        if value := _number(file, architecture, name, int, 0):
            raise ModelLoadError(f"{file.path}: field '{architecture}.{name}' = {value} is not supported")


def _linear_factor(file: GGUFFile, architecture: str) -> float | None:
    """The number that linear scaling divides positions by, None where there is none.

    As llama.cpp reads it: without a type a factor means linear scaling, under its older name too, and 0 is
    no factor; the type "none" overrules it.
    """
    names = {
        name: f"{architecture}.rope.{name}" for name in ("scaling.type", "scaling.factor", "scale_linear")
    }
    kind = file.get(names["scaling.type"])
    if kind not in (None, "none", "linear"):
        raise ModelLoadError(
            f"{file.path}: rope scaling {shown(kind)} is not supported; supported: none, linear"
        )
    if kind == "none":
        return None
    name = "scaling.factor" if file.get(names["scaling.factor"]) is not None else "scale_linear"
    if file.get(names[name]) is None:
        if kind is None:
            return None
        name = "scaling.factor"  # whose absence is to be named
    return file.number(names[name], float) or None


def _rope_scaling(file: GGUFFile, architecture: str) -> RopeScaling | None:
    attention_factor = file.number(f"{architecture}.rope.scaling.attn_factor", float, 1.0)
    if attention_factor != 1.0:
        raise ModelLoadError(
            f"{file.path}: field '{architecture}.rope.scaling.attn_factor' = {attention_factor} is not "
            f"supported; supported: 1.0"
        )
    linear = _linear_factor(file, architecture)
    if ROPE_FACTORS in file.shapes:
        factors = np.asarray(file.read(ROPE_FACTORS), np.float32) * np.float32(linear or 1.0)
        return FrequencyFactors(factors=tuple(factors.tolist()))
    return None if linear is None else LinearScaling(factor=linear)


def _trained_context(file: GGUFFile, architecture: str) -> int:
    """Tokens of context; linear scaling stretches it as it does in a `config.json`."""
    positions = file.number(f"{architecture}.context_length", int)
    linear = _linear_factor(file, architecture)
    if linear is None:
        return positions
    original = file.number(f"{architecture}.rope.scaling.original_context_length", int, positions)
    scaling = {"rope_type": "linear", "factor": linear, "original_max_position_embeddings": original}
    return trained_context({"rope_scaling": scaling}, positions)
