"""llama.cpp through `xllamacpp`, serving SmolLM2 with weights and cache in float32, in `SLOTS` slots."""

import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.compare_llama_cpp import write_dequantized
from benchmarks.serving_work import MAX_TOKENS, Serve, Served, Work
from jaxkv.models.loading import find_model

SLOTS = 8


def continuous() -> Serve:
    """Its server, which keeps no prompts.

    It never draws a token that ends a text, so that its texts differ where others go on after one.
    """
    import xllamacpp  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float32.gguf"
        write_dequantized(find_model("smollm2-135m"), path)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = SLOTS * MAX_TOKENS, SLOTS, True, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        server = xllamacpp.Server(params)

    def answer(prompt: list[int], count: int) -> list[int]:
        request = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "verbose": True,
        }
        result = server.handle_completions(request)
        return (json.loads(result) if isinstance(result, str) else result)["__verbose"]["tokens"]

    def run(work: Work) -> Served:
        # It queues what finds no slot.
        with ThreadPoolExecutor(2 * SLOTS) as threads:
            start = time.perf_counter()
            tokens = list(threads.map(answer, *work))
            return Served(time.perf_counter() - start, tokens)

    return run
