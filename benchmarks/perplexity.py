"""What do quantized pools cost in quality? Perplexity of SmolLM2 on English prose, by how K and V are kept.

The text is the language reference that Python ships for `help()`. Each window of tokens is a sequence that
goes through the cache as a prompt does, in chunks: allocated, appended (and quantized), attended to. The
first token of a window is given, all others are predicted.

Targets: int8 within 0.2% of float32, fp8 within 1%, int4 within 3%.

    python -m benchmarks.perplexity [--windows N] [--only DTYPE ...]

Exit status: 0, or 1 where a target is missed. The last line of output is one JSON document.
"""

import argparse
import json
import sys
from functools import partial
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv.cli.options import KV_DTYPES
from jaxkv.models import load

WINDOW, CHUNK, PAGE_SIZE = 512, 256, 16
TARGETS = {"int8": 0.002, "fp8": 0.01, "int4": 0.03}


@partial(jax.jit, donate_argnames="cache")
def read_chunk(model, cache, tokens, targets):
    """Appends a chunk to the one sequence; returns the sum of its negative log-likelihoods."""
    cache, batch = jaxkv.allocate(cache, jnp.zeros(1, jnp.int32), jnp.full(1, CHUNK), total_tokens=CHUNK)
    logits, cache = model(tokens, cache, batch)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    return cache, -jnp.sum(jnp.where(targets >= 0, chosen, 0.0)), batch.status


def perplexity(loaded, windows: np.ndarray, kv_dtype: str) -> float:
    """Of all windows, `[windows, WINDOW]`, each read on its own."""
    dtype, quantization = KV_DTYPES[kv_dtype]
    config = loaded.config.cache_config(
        num_pages=WINDOW // PAGE_SIZE,
        page_size=PAGE_SIZE,
        max_seqs=1,
        dtype=dtype or "float32",
        quantization=quantization,
    )
    cache, total = jaxkv.init(config), 0.0
    for window in windows:
        targets = np.append(window[1:], -1).astype(np.int32)  # nothing to predict after the last
        for start in range(0, WINDOW, CHUNK):
            part = slice(start, start + CHUNK)
            cache, nll, status = read_chunk(loaded.model, cache, window[part], targets[part])
            jaxkv.raise_for_status(status)
            total += float(nll)
        cache = jaxkv.free(cache, jnp.zeros(1, jnp.int32))
    return float(np.exp(total / (windows.size - len(windows))))


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Perplexity by how K and V are kept.")
    parser.add_argument("--windows", type=int, default=9, help=f"windows of {WINDOW} tokens (default: 9)")
    parser.add_argument("--only", nargs="+", choices=KV_DTYPES, default=list(KV_DTYPES), metavar="DTYPE")
    options = parser.parse_args()
    loaded = load("smollm2-135m")
    assert loaded.tokenizer is not None
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    ids = np.asarray(loaded.tokenizer.encode(prose[: 16 * WINDOW * options.windows]), np.int32)
    if ids.size < options.windows * WINDOW or options.windows < 1:
        parser.error(f"--windows {options.windows}: there are 1 to {ids.size // WINDOW}")
    windows = ids[: options.windows * WINDOW].reshape(options.windows, WINDOW)
    print(f"{loaded.name}, {windows.size} tokens of Python's own documentation in windows of {WINDOW}\n")
    print(f"{'K and V':<10}{'bytes a token':>14}{'perplexity':>12}{'against f32':>13}{'target':>8}")
    rows, missed = {}, []
    for name in ["f32", *(name for name in options.only if name != "f32")]:
        dtype, quantization = KV_DTYPES[name]
        config = loaded.config.cache_config(
            num_pages=1, page_size=1, dtype=dtype or "float32", quantization=quantization
        )
        value = perplexity(loaded, windows, name)
        change = value / rows["f32"]["perplexity"] - 1 if rows else 0.0
        ok = name not in TARGETS or change <= TARGETS[name]
        target = f"{TARGETS[name]:.1%}" if name in TARGETS else ""
        print(
            f"{name:<10}{config.page_bytes:>14,}{value:>12.4f}{change:>+13.3%}{target:>8}"
            f"{'' if ok else '  MISSED'}",
            flush=True,
        )
        rows[name] = {"perplexity": value, "bytes_a_token": config.page_bytes, "change": change}
        missed += [] if ok else [name]
    print(json.dumps({"benchmark": "perplexity", "tokens": windows.size, "rows": rows, "missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
