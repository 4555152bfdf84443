"""Loads a GGUF file: sizes from the metadata, tensors dequantized one by one."""

import functools
import math
from collections.abc import Callable, Mapping
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
from jaxkv.rope import FrequencyFactors, LinearScaling, LongRopeScaling, RopeScaling, YarnScaling

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
# Values of fields that would change the rotary scaling in ways that are not built.
_USUAL = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


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
    config = gguf_config(file).for_context(max_context)
    names = BY_ARCHITECTURE[file.get("general.architecture")].gguf_names
    ignored = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
    model = build_model(
        config, file, names, dtype=dtype, ignored=lambda name: name in ignored, progress=progress
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
    same = ["attention.value_length"] + ["rope.dimension_count"] * (family.partial_rotary is None)
    for name in same:
        if (size := number(name, int, head_dim)) != head_dim:
            raise _unsupported(file, f"{architecture}.{name}", size, f"the head's {head_dim}")
    rotated = number("rope.dimension_count", int, head_dim)
    try:
        options = family.options(Fields({**family.absent, **raw, **family.header(file)}))
        if "window" not in options and (window := number("attention.sliding_window", int, 0)):
            raise _unsupported(file, f"{architecture}.attention.sliding_window", window)
        if "experts" not in options and (experts := number("expert_count", int, 0)):
            raise _unsupported(file, f"{architecture}.expert_count", experts)
        if "rms_norm_eps" not in options:
            options = {**options, "rms_norm_eps": number("attention.layer_norm_rms_epsilon", float)}
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_q_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            head_dim=head_dim,
            intermediate_size=raw["intermediate_size"],
            rope_theta=number("rope.freq_base", float, 10000.0),
            rope_pairing=family.gguf_pairing,
            rope_scaling=_rope_scaling(file, architecture, raw),
            rotary_features=None if rotated == head_dim else rotated,
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


def _rope_scaling(file: GGUFFile, architecture: str, raw: Mapping[str, Any]) -> RopeScaling | None:
    settings, number = raw["rope_scaling"], functools.partial(_number, file, architecture)
    if LONG_FACTORS in file.shapes and SHORT_FACTORS in file.shapes:
        return LongRopeScaling(
            short_factors=_factors(file, SHORT_FACTORS),
            long_factors=_factors(file, LONG_FACTORS),
            original_max_position=number(
                "rope.scaling.original_context_length", int, raw["max_position_embeddings"]
            ),
            magnitude=number("rope.scaling.attn_factor", float, 1.0),
        )
    for name, usual in _USUAL.items():
        if (value := number(name, float, usual)) != usual:
            raise _unsupported(file, f"{architecture}.{name}", value, str(usual))
    kind = None if settings is None else settings["rope_type"]
    if settings is not None and kind == "yarn" and ROPE_FACTORS not in file.shapes:
        return _yarn(number, settings)
    if kind not in (None, "linear"):
        raise ModelLoadError(
            f"{file.path}: rope scaling {shown(kind)} is not supported; supported: none, linear, yarn"
        )
    linear = None if settings is None else settings["factor"]
    if ROPE_FACTORS in file.shapes:
        factors = np.asarray(_factors(file, ROPE_FACTORS), np.float32) * np.float32(linear or 1.0)
        return FrequencyFactors(factors=tuple(factors.tolist()))
    return None if linear is None else LinearScaling(factor=linear)


def _yarn(number: Callable[..., Any], settings: Mapping[str, Any]) -> RopeScaling:
    """YaRN as in llama.cpp, which always rounds to whole pairs."""
    factor = number("rope.scaling.factor", float)
    return YarnScaling(
        factor=factor,
        original_max_position=settings["original_max_position_embeddings"],
        beta_fast=number("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=number("rope.scaling.yarn_beta_slow", float, 1.0),
        magnitude=1.0 + 0.1 * math.log(factor) if factor > 1.0 else 1.0,
    )


def _factors(file: GGUFFile, name: str) -> tuple[float, ...]:
    return tuple(np.asarray(file.read(name), np.float32).reshape(-1).tolist())
