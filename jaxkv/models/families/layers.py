"""Which layers of a `config.json` have the window."""

from collections.abc import Sequence
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.checkpoints.hf_folder import shown

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_kinds(fields: Fields, allowed: Sequence[str] = (FULL, SLIDING)) -> list[str]:
    """`layer_types`, or nothing if the config does not say.

    Raises:
      ValueError: for an invalid list, or a kind that is not supported.
    """
    if fields.raw.get("layer_types") is None:
        return []
    kinds = fields.layer_types(fields.integer("num_hidden_layers")) or []
    for kind in kinds:
        if kind not in allowed:
            raise ValueError(f"layer_types {shown(kind)} is not supported; supported: {', '.join(allowed)}")
    return kinds


def windows(fields: Fields, kinds: Sequence[str]) -> dict[str, Any]:
    """The arguments of `ModelConfig` for the window; without `kinds`, every layer has it.

    Raises:
      ValueError: if layers need a window that the config does not have.
    """
    window = fields.optional("sliding_window")
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == FULL)
    if window is None and len(full) < len(kinds):
        raise ValueError("layer_types has sliding_attention, but sliding_window is null")
    if kinds and len(full) == len(kinds):
        return {}
    return {"window": window, "full_attention_layers": full}


def every_nth_full(fields: Fields, period: int) -> list[str]:
    """`layer_types`, or full attention in every `period`-th layer if the config does not say."""
    layers = range(1, fields.integer("num_hidden_layers") + 1)
    return layer_kinds(fields) or [SLIDING if layer % period else FULL for layer in layers]


def by_pattern(fields: Fields, period: int) -> list[str]:
    """`layer_types`, or as `sliding_window_pattern` says, else as `every_nth_full`."""
    if kinds := layer_kinds(fields):
        return kinds
    flags = fields.window_pattern(fields.integer("num_hidden_layers"), period)
    return [SLIDING if flag else FULL for flag in flags]


def header_windows(file: GGUFFile, architecture: str, period: int) -> dict[str, Any]:
    """The window and `layer_types` of a GGUF file's header, which may have a pattern: a period or flags."""
    window = file.number(f"{architecture}.attention.sliding_window", int, 0)
    pattern = file.get(f"{architecture}.attention.sliding_window_pattern", period)
    if not window:
        return {"sliding_window": None, "layer_types": None}
    if type(pattern) is int and pattern >= 1:
        layers = range(1, file.number(f"{architecture}.block_count", int) + 1)
        pattern = [bool(layer % pattern) for layer in layers]
    if not isinstance(pattern, list) or not all(isinstance(flag, bool) for flag in pattern):
        raise ValueError(f"sliding_window_pattern must be a period or a list of flags, not {shown(pattern)}")
    return {"sliding_window": window, "layer_types": [SLIDING if flag else FULL for flag in pattern]}
