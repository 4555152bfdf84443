"""What SmolLM2 writes on this device in float32, greedily: 64 tokens for each of three prompts, as JSON.

    python -m tests.gpu.text [--weights PATH]

Exit status: 0, or 2 where the weights are not there.
"""

import argparse
import json
import sys

import jax

import jaxkv
from jaxkv.models import ModelLoadError, load

NEW_TOKENS = 64
QUESTIONS = (
    "What is the capital of France?",
    "Name the planets of our solar system in order.",
    "Explain to a child of six how a letter gets from one town to another.",
)


def tokens(weights: str) -> list[list[int]]:
    """The token ids of each text; none ends one early."""
    loaded = load(weights, dtype="float32")
    if loaded.tokenizer is None:
        raise ModelLoadError(f"{weights}: has no tokenizer")
    prompts = [loaded.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in QUESTIONS]
    config = loaded.config.cache_config(num_pages=64, max_seqs=4, max_pages_per_seq=16, dtype="float32")
    # A GPU would multiply float32 in TF32 otherwise, with ten bits.
    with jax.default_matmul_precision("highest"):
        result = jaxkv.generate(loaded.model, config, prompts, max_new_tokens=NEW_TOKENS)
    return [samples[0] for samples in result.tokens]


def main() -> int:
    """Prints what it writes; returns the exit status."""
    parser = argparse.ArgumentParser(description="SmolLM2's greedy text in float32, as JSON.")
    parser.add_argument("--weights", default="smollm2-135m", help="a GGUF file, a folder or a known name")
    options = parser.parse_args()
    try:
        written = tokens(options.weights)
    except ModelLoadError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"platform": jax.default_backend(), "tokens": written}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
