"""Converts the header of a GGUF file to the equivalent `config.json`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxkv.checkpoints.fields import most
from jaxkv.checkpoints.hf_folder import shown
from jaxkv.errors import ModelLoadError

if TYPE_CHECKING:
    from jaxkv.checkpoints.gguf_file import GGUFFile  # needs an optional dependency

# `general.architecture` of a GGUF file, and the equivalent `model_type`. Mistral's files say "llama" too.
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "smollm3": "smollm3",
    "seed_oss": "seed_oss",
    "exaone4": "exaone4",
    "ernie4_5": "ernie4_5",
    "cohere2": "cohere2",
    "glm4": "glm4",
    "starcoder2": "starcoder2",
}
# Of files with experts.
_WITH_EXPERTS = {
    "llama": "mixtral",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "granitemoe": "granitemoe",
}
# Without a window in the file, llama.cpp takes that of the published models.
_OWN_WINDOW = ("gemma2",)
EMBEDDING, UNEMBEDDING = "token_embd.weight", "output.weight"


def planned_fields(file: "GGUFFile") -> dict[str, Any]:
    """As `config_fields`, with all that determines a model's memory: experts, biases, the layers' windows.

    Raises:
      ModelLoadError: as `config_fields`, and for experts of an architecture that has none.
    """
    raw, kind = config_fields(file, MODEL_TYPES), file.get("general.architecture")

    def number(name: str, default: int | None = None) -> int:
        return file.number(f"{kind}.{name}", int, default)

    if count := number("expert_count", 0):
        if kind not in _WITH_EXPERTS:
            raise ModelLoadError(f"{file.path}: field '{kind}.expert_count' = {count} is not supported")
        raw |= {
            "model_type": _WITH_EXPERTS[kind],
            "num_local_experts": count,
            "num_experts_per_tok": number("expert_used_count"),
            "moe_intermediate_size": number("expert_feed_forward_length", raw["intermediate_size"]),
        }
    biased = {"attention_bias": "attn_q", "mlp_bias": "ffn_up", "use_bias": "attn_q"}
    raw |= {name: f"blk.0.{tensor}.bias" in file.shapes for name, tensor in biased.items()}
    del raw["sliding_window"]
    return raw | _windows(file, kind, raw["num_hidden_layers"])


def _windows(file: "GGUFFile", kind: str, layers: int) -> dict[str, Any]:
    """The window, and the layers that have it: a list of flags, a period, or as their class has it."""
    window = file.number(f"{kind}.attention.sliding_window", int, 0) or None
    pattern = file.get(f"{kind}.attention.sliding_window_pattern")
    if kind == "olmo2" and window is not None:
        return {"model_type": "olmo3", "sliding_window": window} | _layers(pattern)
    if kind == "exaone4" and window is None:
        return {"layer_types": ["full_attention"] * min(layers, most("num_hidden_layers"))}
    # Without one in its file, the class's own.
    return ({} if window is None and kind in _OWN_WINDOW else {"sliding_window": window}) | _layers(pattern)


def _layers(pattern: object) -> dict[str, Any]:
    if not isinstance(pattern, list):
        return {"sliding_window_pattern": pattern}
    return {"layer_types": ["sliding_attention" if flag else "full_attention" for flag in pattern]}


def config_fields(file: "GGUFFile", supported: Mapping[str, str]) -> dict[str, Any]:
    """The fields of the `config.json` equivalent to a file's header.

    Args:
      file: the GGUF file.
      supported: architectures that the caller supports, and the `model_type` of each.

    Raises:
      ModelLoadError: for another architecture, a file of several parts, or a field that is missing or not an
        integer; the message names it.
    """
    kind = file.get("general.architecture")
    if not isinstance(kind, str) or kind not in supported:
        raise ModelLoadError(
            f"{file.path}: architecture {shown(kind)} is not supported; supported: {', '.join(supported)}"
        )
    if (parts := file.number("split.count", int, 1)) > 1:
        raise ModelLoadError(f"{file.path}: is one of {parts} parts; merge them with gguf-split first")
    if EMBEDDING not in file.shapes:
        raise ModelLoadError(f"{file.path}: tensor {EMBEDDING!r} is missing")
    if len(file.shapes[EMBEDDING]) != 2:
        raise ModelLoadError(f"{file.path}: tensor {EMBEDDING!r} has shape {file.shapes[EMBEDDING]}")

    def number(name: str, default: int | None = None) -> int:
        return file.number(f"{kind}.{name}", int, default)

    heads, hidden, positions = map(number, ("attention.head_count", "embedding_length", "context_length"))
    return {
        "model_type": supported[kind],
        "num_hidden_layers": number("block_count"),
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", hidden // max(heads, 1)),
        "max_position_embeddings": positions,
        "sliding_window": file.get(f"{kind}.attention.sliding_window"),
        "vocab_size": file.shapes[EMBEDDING][0],
        "tie_word_embeddings": UNEMBEDDING not in file.shapes,
        "rope_scaling": _rope_scaling(file, kind, positions),
    }


def _rope_scaling(file: "GGUFFile", kind: str, positions: int) -> dict[str, Any] | None:
    """The rotary scaling, with the field names of a `config.json`.

    As llama.cpp reads it: without a type, a factor (also under its older name) means linear scaling; a factor
    of 0 means none; the type "none" takes precedence over a factor.
    """
    scaling = file.get(f"{kind}.rope.scaling.type")
    names = [f"{kind}.rope.{name}" for name in ("scaling.factor", "scale_linear")]
    given = [name for name in names if file.get(name) is not None]
    if scaling == "none" or (scaling is None and not given):
        return None
    # Only linear scaling requires a factor.
    factor = file.number((given or names)[0], float) if given or scaling == "linear" else None
    if not factor and scaling in (None, "linear"):
        return None
    return {
        "rope_type": "linear" if scaling is None else scaling,
        "factor": factor or None,
        "original_max_position_embeddings": file.number(
            f"{kind}.rope.scaling.original_context_length", int, positions
        ),
    }
