"""Weights as they lie on a disk: how many bytes, and what a GGUF file says of its model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxkv.checkpoints.hf_folder import INDEX_FILE, WHOLE_FILE, read_json, shard_files, shown

if TYPE_CHECKING:
    from jaxkv.checkpoints.gguf_file import GGUFFile

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

    The files are those that the loader reads. An index says how many bytes they have (`metadata.total_size`);
    else the files do, whose headers are negligible.

    Raises:
      ValueError: for an index that is damaged, or shards of different sets.
    """
    if (whole := folder / WHOLE_FILE).is_file():
        return whole.stat().st_size
    index = folder / INDEX_FILE
    if index.is_file():
        metadata = read_json(index).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if isinstance(total, bool) or not isinstance(total, (int, float)) or not 1 <= total < 2**53:
            raise ValueError(f"{index}: metadata.total_size must be a positive number, not {shown(total)}")
        return int(total)
    parts, missing = shard_files(folder)
    # A download may have stopped early.
    return sum(part.stat().st_size for part in parts) if parts and not missing else None


def read_gguf(path: Path) -> dict[str, Any]:
    """The fields of a `config.json` that say the same as a GGUF file's header.

    Raises:
      ValueError: when it is damaged, or of an architecture that is not known.
    """
    from jaxkv.checkpoints.gguf_file import GGUFFile  # its reader is an extra

    file = GGUFFile(path)
    kind = file.get("general.architecture")
    if not isinstance(kind, str) or kind not in _GGUF_TYPES:
        raise ValueError(f"{path}: architecture {shown(kind)} is not known; known: {', '.join(_GGUF_TYPES)}")
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
        "rope_scaling": _gguf_scaling(file, kind),
    }


def _gguf_scaling(file: "GGUFFile", kind: str) -> dict[str, Any] | None:
    """The rotary scaling, with the names of a `config.json`."""
    scaling, factor = file.get(f"{kind}.rope.scaling.type"), file.get(f"{kind}.rope.scaling.factor")
    factor = file.get(f"{kind}.rope.scale_linear") if factor is None else factor
    if scaling == "none" or not factor:
        return None
    return {
        # Without a type a factor means linear scaling.
        "rope_type": "linear" if scaling is None else scaling,
        "factor": factor,
        "original_max_position_embeddings": file.get(f"{kind}.rope.scaling.original_context_length"),
    }
