"""Reads a Hugging Face model folder as `transformers` does: `config.json`, rotary settings, weight files.

The model loader and the planner share it, so that both read the same model from a folder.
"""

import difflib
import json
import math
import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

WHOLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5,})-of-(\d{5,})\.safetensors")

# Far above any published model.
MOST_POSITIONS = 2**27
# Defaults of `transformers` for absent fields. A null means no window, and as many KV heads as query heads.
_WHERE_ABSENT: dict[str, dict[str, int]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128},
}

# Rotary settings that are valid without a type.
_UNTYPED = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
# Scalings that multiply `max_position_embeddings`; with llama3 or longrope it is already multiplied.
_STRETCHES = ("linear", "dynamic", "yarn")

_SHORT = reprlib.Repr()
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 2
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 50, 50
_MOST_SHOWN, _MOST_QUOTED = 80, 160


def closest(name: object, names: Collection[str]) -> str:
    """Of many names those most like one, for the message that refuses it, and how many others there are."""
    found = difflib.get_close_matches(str(name)[:40], names, n=4, cutoff=0.0)
    return f"{', '.join(found)} and {len(names) - len(found)} others"


def shown(value: object) -> str:
    """A value for a message: one line of at most 80 characters.

    Example:
      >>> shown("4096"), shown({"bits": 4, "group_size": 64, "mode": "affine", "biases": True})
      ("'4096'", "{'biases': True, 'bits': 4, ...}")
    """
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length():,} bits"
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def one_line(error: object) -> str:
    """The text of another package's error, for the end of a message: one line of at most 160 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MOST_QUOTED else text[: _MOST_QUOTED - 3] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """A file, or the `config.json` of a folder.

    Raises:
      ValueError: if it cannot be read or is not a JSON object.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(raw).__name__}")
    return raw


def with_defaults(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with the defaults of `transformers` for absent fields, by `model_type`.

    Example:
      >>> with_defaults({"model_type": "mistral", "sliding_window": None})["num_key_value_heads"]
      8
    """
    kind = raw.get("model_type")
    return {**_WHERE_ABSENT.get(kind, {}), **raw} if isinstance(kind, str) else raw


def rotary_settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings of a config. The older `rope_scaling`, if present, replaces `rope_parameters`.

    Raises:
      ValueError: if either is not an object.
    """
    for name in ("rope_scaling", "rope_parameters"):
        value = raw.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name} must be an object, not {shown(value)}")
    return raw.get("rope_scaling") or raw.get("rope_parameters") or {}


def rotary_type(settings: Mapping[str, Any]) -> str:
    """The type of the rotary settings; "default" without scaling.

    Raises:
      ValueError: for a type that is not a string, or settings that require a type.
    """
    kind = settings.get("rope_type") or settings.get("type")
    if kind is None:
        stray = sorted(str(name) for name, value in settings.items() if value is not None)
        stray = [name for name in stray if name not in _UNTYPED]
        if stray:
            raise ValueError(f"rope_scaling needs a rope_type beside {shown(', '.join(stray))}")
        return "default"
    if not isinstance(kind, str):
        raise ValueError(f"rope_scaling's rope_type must be a string, not {shown(kind)}")
    return kind


def original_positions(raw: Mapping[str, Any], settings: Mapping[str, Any], positions: int) -> int:
    """Positions of the model before rotary scaling; `positions` if the config does not say.

    Raises:
      ValueError: for a value that is not a positive integer.
    """
    name = "original_max_position_embeddings"
    value = settings.get(name) if raw.get(name) is None else raw[name]
    if value is None:
        return positions
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_POSITIONS:
        raise ValueError(f"{name} must be an integer from 1 to {MOST_POSITIONS}, not {shown(value)}")
    return value


def of_full_attention(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings of layers with full attention, where each kind of layer has its own."""
    # Models with windows may have separate settings for each kind of layer.
    nested = settings.get("full_attention")
    return nested if isinstance(nested, Mapping) else settings


def trained_context(raw: Mapping[str, Any], positions: int) -> int:
    """Tokens of context that a model supports, including rotary scaling.

    Linear, dynamic and yarn scaling multiply the original positions. With llama3 and longrope, and always in
    Gemma 3, `max_position_embeddings` is already scaled.

    Args:
      raw: the config.
      positions: its `max_position_embeddings`, in tokens.

    Returns:
      At least `positions`.

    Raises:
      ValueError: for invalid settings, or a scaling without a positive factor.

    Example:
      >>> trained_context({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 2048)
      8192
    """
    settings = of_full_attention(rotary_settings(raw))
    kind = rotary_type(settings)
    if kind not in _STRETCHES or str(raw.get("model_type")).startswith("gemma3"):
        return positions
    factor = settings.get("factor")
    if factor is None and kind == "yarn":
        return positions  # the factor is then `positions` divided by the original positions
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise ValueError(f"rope_scaling's factor must be a positive number, not {shown(factor)}")
    original = min(original_positions(raw, settings, positions), MOST_POSITIONS)
    return max(positions, int(min(original * factor, MOST_POSITIONS)))


def is_extended(raw: Mapping[str, Any], positions: int) -> bool:
    """Whether rotary scaling makes `trained_context` longer than the originally trained context.

    Args:
      raw: the config.
      positions: its `max_position_embeddings`, in tokens.

    Raises:
      ValueError: as `trained_context`.
    """
    settings = of_full_attention(rotary_settings(raw))
    if rotary_type(settings) not in _STRETCHES:
        return False
    return trained_context(raw, positions) > original_positions(raw, settings, positions)


def shard_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The shards of a folder without an index, from their names.

    Returns:
      The shards that exist, in order, and the names of the missing ones.

    Raises:
      ValueError: for shards of different sets.
    """
    found = {path: _SHARD.fullmatch(path.name) for path in sorted(folder.glob("model-*.safetensors"))}
    named = {path: match for path, match in found.items() if match}
    counts = sorted({match[2] for match in named.values()})
    if len(counts) > 1:
        raise ValueError(
            f"{folder}: holds shards of different sets: of {' and of '.join(map(shown, counts))}"
        )
    if not named:
        return [], []
    width, count = len(counts[0]), int(counts[0])
    if count > 10**5:
        raise ValueError(f"{folder}: has a shard of {counts[0][:20]}, at most {10**5} are supported")
    wanted = [f"model-{number:0{width}}-of-{counts[0]}.safetensors" for number in range(1, count + 1)]
    there = [folder / name for name in wanted if folder / name in named]
    return there, [name for name in wanted if folder / name not in named]
