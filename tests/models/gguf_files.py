"""Writes small GGUF files for the tests, the way llama.cpp's converter writes large ones."""

import json
from pathlib import Path

import gguf
import numpy as np

from jaxkv.checkpoints.hf_folder import of_full_attention
from jaxkv.models import Decoder
from jaxkv.models.families.registry import BY_ARCHITECTURE, family_of
from jaxkv.models.load_hf import SafetensorsFolder, load_hf
from jaxkv.models.weights import as_stored, pieces

Types = gguf.GGMLQuantizationType
QK = {
    "attn_q.weight": "num_attention_heads",
    "attn_k.weight": "num_key_value_heads",
    "attn_q.bias": "num_attention_heads",
    "attn_k.bias": "num_key_value_heads",
}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders a Llama Q or K projection's rows so that features `i, i + half` become neighbours."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def convert(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A Hugging Face checkpoint's config, and its tensors under GGUF names in float32."""
    raw = json.loads((folder / "config.json").read_text())
    family, (_, config) = family_of(raw), load_hf(folder, dtype=np.float32)
    source, tensors = family.hf_source(SafetensorsFolder(folder)), {}

    def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
        whole = np.empty(shape, np.float32)
        for piece in pieces(config, family.hf_names, name, shape):
            as_stored(name, whole)[piece.rows] = source.read(piece.name)
        if name.endswith("norm"):
            whole += np.float32(family.hf_names.norm_offset)
        for piece in pieces(config, BY_ARCHITECTURE[architecture_of(raw)].gguf_names, name, shape):
            tensors[piece.name] = np.ascontiguousarray(as_stored(name, whole)[piece.rows])
        return whole

    Decoder(config, parameter)
    if BY_ARCHITECTURE[architecture_of(raw)].gguf_pairing != family.hf_pairing:
        for name in tensors:
            if key := QK.get(name.partition(".")[2].partition(".")[2]):
                tensors[name] = permute(tensors[name], raw[key])
    return raw, tensors


def architecture_of(raw: dict) -> str:
    """The architecture that a GGUF file of this `config.json` names."""
    return family_of(raw).architecture or {"olmo3": "olmo2"}.get(raw["model_type"], "llama")


def metadata(raw: dict) -> dict[str, object]:
    """The header fields of a model with this `config.json`."""
    architecture = architecture_of(raw)
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    rotary = of_full_attention(raw["rope_parameters"])
    fields = {
        "block_count": raw["num_hidden_layers"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": rotary["rope_theta"],
        "rope.dimension_count": int(head_dim * rotary.get("partial_rotary_factor", 1)),
    }
    if "rms_norm_eps" in raw:
        fields["attention.layer_norm_rms_epsilon"] = raw["rms_norm_eps"]
    named = {f"{architecture}.{name}": value for name, value in fields.items()}
    return {"general.architecture": architecture} | named


# A vocabulary for the 96 ids of the fixtures: all that "hello" needs, three special tokens, filler.
LETTERS = ["h", "e", "l", "o", "Ġ", "he", "ll", "hell", "hello", "Ġhello", "Ċ"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = SPECIAL + LETTERS + [f"x{i}" for i in range(96 - len(SPECIAL) - len(LETTERS))]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (96 - len(SPECIAL)),
    "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o", "Ġ hello"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}",
}


def write(path: Path, fields: dict, tensors: dict[str, np.ndarray], types: dict | None = None) -> Path:
    """A GGUF file; a tensor named in `types` is raw data of that quantization type."""
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for name, value in fields.items():
        if name == "general.architecture":
            continue
        add = {str: writer.add_string, list: writer.add_array, float: writer.add_float32}
        add.get(type(value), writer.add_uint32)(name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_checkpoint(path: Path, folder: Path, **change) -> Path:
    """A fixture as a float32 GGUF file; `change` replaces fields and tensors, None leaves one out."""
    raw, tensors = convert(folder)
    everything = metadata(raw) | TOKENIZER | tensors | change.get("replace", {})
    kept = {name: value for name, value in everything.items() if value is not None}
    arrays = {name: value for name, value in kept.items() if isinstance(value, np.ndarray)}
    return write(path, {name: kept[name] for name in kept if name not in arrays}, arrays)


def quantized_blocks(rng: np.random.Generator, shape: tuple[int, int], kind: Types) -> np.ndarray:
    """Random raw rows of a quantization type, with scales that are ordinary float16 numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    places = {
        Types.Q8_0: (0,),
        Types.Q5_0: (0,),
        Types.Q4_0: (0,),
        Types.Q4_1: (0, 2),
        Types.Q4_K: (0, 2),
        Types.Q6_K: (208,),
    }
    for place in places[kind]:
        scales = rng.uniform(0.001, 0.01, rows.shape[:2]).astype(np.float16)
        rows[..., place : place + 2] = scales[..., None].view(np.uint8)
    return rows.reshape(shape[0], -1)
