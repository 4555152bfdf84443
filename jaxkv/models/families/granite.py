"""Granite 3: Llama with factors of embeddings, scores, residuals and logits."""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds

_IN_HEADER = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}


def options(fields: Fields) -> dict[str, Any]:
    """The factors; logits are divided by theirs."""
    layer_kinds(fields, allowed=(FULL,))
    scaling = fields.number("logits_scaling", 1.0)
    if not scaling > 0:
        raise ValueError(f"logits_scaling must be positive, not {scaling!r}")
    return {
        "embedding_multiplier": fields.number("embedding_multiplier", 1.0),
        "residual_multiplier": fields.number("residual_multiplier", 1.0),
        "query_scale": fields.number("attention_multiplier", 1.0),
        "logit_multiplier": 1.0 / scaling,
    }


def header(file: GGUFFile) -> dict[str, Any]:
    """The factors."""
    return header_factors(file, "granite")


def header_factors(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The factors by their names in `config.json`; without one, scores have their usual scale."""

    def number(name: str, default: int | None = None) -> int:
        return file.number(f"{architecture}.{name}", int, default)

    width = number("embedding_length") // max(number("attention.head_count"), 1)
    usual = max(number("attention.key_length", width), 1) ** -0.5
    found = {name: file.get(f"{architecture}.{field}") for name, field in _IN_HEADER.items()}
    return {"attention_multiplier": usual} | {name: value for name, value in found.items() if value}


# Q and K were permuted when the GGUF file was written.
FAMILY = Family(
    model_types=("granite",),
    options=options,
    architecture="granite",
    header=header,
    gguf_pairing="interleaved",
)
