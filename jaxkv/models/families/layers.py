"""Which layers of a `config.json` have the window."""

from collections.abc import Sequence
from typing import Any

from jaxkv.checkpoints.fields import Fields
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
