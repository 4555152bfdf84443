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
    """Bytes of a model's safetensors weights, None where the folder does not have all of them.

    An index says so itself (`metadata.total_size`); else the files do, whose headers are negligible.

    Raises:
      ValueError: for an index that is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        metadata = read_json(index).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if isinstance(total, bool) or not isinstance(total, (int, float)) or not 1 <= total < 2**53:
            raise ValueError(f"{index}: metadata.total_size must be a positive number, not {total!r}")
        return int(total)
    if (whole := folder / "model.safetensors").is_file():
        return whole.stat().st_size
    parts = sorted(folder.glob("model-?????-of-?????.safetensors"))
    # Each names how many there are; a download may have stopped early.
    complete = {part.stem[-5:] for part in parts} == {f"{len(parts):05}"}
    return sum(part.stat().st_size for part in parts) if complete else None


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
    if file.number("split.count", int, 1) > 1:
        raise ValueError(f"{path}: is one of several parts; plan from the model's config.json")
    if file.number(f"{kind}.expert_count", int, 0):
        raise ValueError(f"{path}: has experts, which are not counted from GGUF; plan from its config.json")
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
