"""Loads a GGUF file: sizes from the metadata, tensors dequantized one by one."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.checkpoints.gguf_header import config_fields
from jaxkv.checkpoints.hf_folder import shown, trained_context
from jaxkv.errors import ModelLoadError
from jaxkv.models.config import ModelConfig
from jaxkv.models.decoder import Decoder
from jaxkv.models.families.registry import BY_ARCHITECTURE
from jaxkv.models.weights import Progress, build_model
from jaxkv.rope import FrequencyFactors, LinearScaling, RopeScaling

ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(
    file: GGUFFile, *, dtype: DTypeLike, max_context: int | None = None, progress: Progress | None = None
) -> tuple[Decoder, ModelConfig]:
    """Reads the model from an open file.

    Args:
      file: the GGUF file.
      dtype: of the model's matrices, whatever the file's are.
      max_context: tokens of the longest context, as for `load`.
      progress: called after each tensor; see `Progress`.

    Raises:
      ModelLoadError: naming the file and the fault.
      ValueError: for a context longer than the model supports.
    """
    config = gguf_config(file).limited(max_context)
    names = BY_ARCHITECTURE[file.get("general.architecture")].gguf_names
    model = build_model(
        config, file, names, dtype=dtype, ignored=lambda name: name == ROPE_FACTORS, progress=progress
    )
    return model, config


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The model's sizes from a file's metadata.

    Raises:
      ModelLoadError: for an unsupported architecture or feature, or an invalid field, naming it.
    """
    raw = config_fields(file, {name: family.model_types[0] for name, family in BY_ARCHITECTURE.items()})
    architecture = file.get("general.architecture")
    family, number = BY_ARCHITECTURE[architecture], functools.partial(_number, file, architecture)
    head_dim = raw["head_dim"]
    for name in ("rope.dimension_count", "attention.value_length"):
        if (size := number(name, int, head_dim)) != head_dim:
            raise _unsupported(file, f"{architecture}.{name}", size, f"the head's {head_dim}")
    try:
        options = family.options(Fields({**family.absent, **raw, **family.header(file)}))
        if "window" not in options and (window := number("attention.sliding_window", int, 0)):
            raise _unsupported(file, f"{architecture}.attention.sliding_window", window)
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_q_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            head_dim=head_dim,
            intermediate_size=raw["intermediate_size"],
            rms_norm_eps=number("attention.layer_norm_rms_epsilon", float),
            rope_theta=number("rope.freq_base", float, 10000.0),
            rope_pairing=family.gguf_pairing,
            rope_scaling=_rope_scaling(file, architecture, raw["rope_scaling"]),
            tied_embeddings=raw["tie_word_embeddings"],
            max_context=trained_context(raw, raw["max_position_embeddings"]),
            **options,
        )
    except ModelLoadError:
        raise
    except ValueError as error:
        raise ModelLoadError(f"{file.path}: {error}") from None


def _number(file: GGUFFile, architecture: str, name: str, kind: Any, default: float | None = None) -> Any:
    return file.number(f"{architecture}.{name}", kind, default)


def _unsupported(file: GGUFFile, field: str, value: object, supported: str | None = None) -> ModelLoadError:
    only = f"; supported: {supported}" if supported else ""
    return ModelLoadError(f"{file.path}: field {field!r} = {value} is not supported{only}")


def _rope_scaling(
    file: GGUFFile, architecture: str, settings: Mapping[str, Any] | None
) -> RopeScaling | None:
    name = f"{architecture}.rope.scaling.attn_factor"
    if (attention_factor := file.number(name, float, 1.0)) != 1.0:
        raise _unsupported(file, name, attention_factor, "1.0")
    if settings is not None and settings["rope_type"] != "linear":
        raise ModelLoadError(
            f"{file.path}: rope scaling {shown(settings['rope_type'])} is not supported; "
            "supported: none, linear"
        )
    linear = None if settings is None else settings["factor"]
    if ROPE_FACTORS in file.shapes:
        factors = np.asarray(file.read(ROPE_FACTORS), np.float32) * np.float32(linear or 1.0)
        return FrequencyFactors(factors=tuple(factors.tolist()))
    return None if linear is None else LinearScaling(factor=linear)
