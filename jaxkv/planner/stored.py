"""Weights as they lie on a disk: how many bytes, and what a GGUF file says of its model."""

from pathlib import Path
from typing import Any

from jaxkv.planner.fields import read_json

# `general.architecture` of a GGUF file, and the `model_type` that means the same.
_GGUF_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}


def safetensors_bytes(folder: Path) -> int | None:
    """Bytes of a folder's safetensors weights, None where it has none.

    An index says so itself (`metadata.total_size`); else the files do, whose headers are negligible.

    Raises:
      ValueError: for an index that is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        total = (read_json(index).get("metadata") or {}).get("total_size")
        if isinstance(total, bool) or not isinstance(total, (int, float)) or total < 1:
            raise ValueError(f"{index}: metadata.total_size must be a positive number, not {total!r}")
        return int(total)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None


def read_gguf(path: Path) -> dict[str, Any]:
    """The fields of a `config.json` that say the same as a GGUF file's header.

    Raises:
      ValueError: when it is damaged, or of an architecture that is not known.
    """
    from jaxkv.models.gguf_file import GGUFFile  # its reader is an extra

    file = GGUFFile(path)
    kind = file.get("general.architecture")
    if kind not in _GGUF_TYPES:
        raise ValueError(f"{path}: architecture {kind!r} is not known; known: {', '.join(_GGUF_TYPES)}")
    if "token_embd.weight" not in file.shapes:
        raise ValueError(f"{path}: has no tensor 'token_embd.weight'")

    def number(name: str) -> int:
        return file.number(f"{kind}.{name}", int)

    heads, hidden = number("attention.head_count"), number("embedding_length")
    return {
        "model_type": _GGUF_TYPES[kind],
        "num_hidden_layers": number("block_count"),
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.number(f"{kind}.attention.head_count_kv", int, heads),
        "head_dim": file.number(f"{kind}.attention.key_length", int, hidden // max(heads, 1)),
        "max_position_embeddings": number("context_length"),
        "sliding_window": file.get(f"{kind}.attention.sliding_window"),
        "vocab_size": file.shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in file.shapes,
    }
