"""`transformers` on PyTorch, serving SmolLM2 in float32 on the CPU: continuous and fixed batches."""

import time
from typing import Any

from benchmarks.serving_work import MAX_NEW, MAX_TOKENS, Serve, Served, Work
from jaxkv.models.loading import find_model

SLOTS, FIXED_BATCH = 32, 8
# Of continuous batching: tokens of a page (its default), and most tokens of a step.
PAGE_SIZE, MAX_BATCH_TOKENS = 256, 256


def _load() -> Any:
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    path = find_model("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    return model.eval()


def continuous() -> Serve:
    """What `generate_batch` does, with a limit for each request, and nothing shared or recorded.

    `generate_batch` itself takes one limit for all requests.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig  # pyright: ignore

    model = _load()
    generation = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW, eos_token_id=-1)
    options = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=SLOTS * -(-MAX_TOKENS // PAGE_SIZE),
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_requests_per_batch=SLOTS,
        allow_block_sharing=False,
    )

    def run(work: Work) -> Served:
        results: dict[str, list[int]] = {}
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=options, warmup=False, timeout=5
        ) as manager:
            start = time.perf_counter()
            names = [
                manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
                for prompt, count in zip(*work, strict=True)
            ]
            while len(results) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    results[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended by itself")
            seconds = time.perf_counter() - start
        return Served(seconds, [results[name] for name in names])

    return run


def fixed() -> Serve:
    """`generate`, `FIXED_BATCH` requests at a time, until the last one has its tokens."""
    import torch  # pyright: ignore[reportMissingImports]

    model = _load()

    @torch.inference_mode()
    def answer(batch: Work) -> list[list[int]]:
        longest = max(len(prompt) for prompt in batch.prompts)
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in batch.prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch.prompts]
        result = model.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=max(batch.new_tokens),
            eos_token_id=None,
            pad_token_id=0,
        )
        rows = result[:, longest:].tolist()
        return [row[:count] for row, count in zip(rows, batch.new_tokens, strict=True)]

    def run(work: Work) -> Served:
        start = time.perf_counter()
        tokens = [row for batch in work.slices(FIXED_BATCH) for row in answer(batch)]
        return Served(time.perf_counter() - start, tokens)

    return run
