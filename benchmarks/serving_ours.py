"""jaxkv serving SmolLM2 in float32: `serve`, and `generate` in fixed batches."""

import time
from collections.abc import Callable

import jax

import jaxkv
from benchmarks.serving_work import MAX_TOKENS, Serve, Served, Work
from jaxkv.models import LoadedModel, load
from jaxkv.serving import Request, ServingConfig, ServingState, serve

SLOTS, FIXED_BATCH, PAGE_SIZE = 64, 8, 16
# Steps of few and of many new tokens, and steps with a chunk of a prompt. On a CPU the time of a step grows
# with its width from 16 tokens on, so that a step wider than needed loses time.
WIDTHS = (16, 32, 64, 128, 256)


def server(
    loaded: LoadedModel, *, slots: int, max_tokens: int, prefix_cache: bool = False, **options
) -> ServingConfig:
    """A server whose pool holds `max_tokens` in each slot; `options` are of `ServingConfig`."""
    columns = -(-max_tokens // PAGE_SIZE)
    cache = loaded.config.cache_config(
        num_pages=slots * columns,
        page_size=PAGE_SIZE,
        max_seqs=slots,
        max_pages_per_seq=columns,
        dtype="float32",
        prefix_cache=prefix_cache,
    )
    return ServingConfig(cache, max_requests=2 * slots, max_tokens=max_tokens, **options)


def serve_all(
    loaded: LoadedModel,
    config: ServingConfig,
    work: Work,
    *,
    block: int = 8,
    on_state: Callable[[ServingState], None] | None = None,
) -> tuple[Served, list[float]]:
    """Serves requests that all come at once; also the seconds until each one's first token."""
    requests = [
        Request(id=number, tokens=prompt, max_new_tokens=count)
        for number, (prompt, count) in enumerate(zip(*work, strict=True))
    ]
    tokens: list[list[int]] = [[] for _ in requests]
    first = [0.0] * len(requests)
    start = time.perf_counter()
    for event in serve(loaded.model, config, requests, block=block, on_state=on_state):
        if event.error is not None:
            raise RuntimeError(f"request {event.id} was refused: {event.error}")
        if event.tokens and not tokens[event.id]:
            first[event.id] = time.perf_counter() - start
        tokens[event.id] += event.tokens
    return Served(time.perf_counter() - start, tokens), first


def continuous() -> Serve:
    """`serve`, without a prefix cache."""
    loaded = load("smollm2-135m", dtype="float32")
    config = server(loaded, slots=SLOTS, max_tokens=MAX_TOKENS, token_budget=WIDTHS[-1], widths=WIDTHS)
    return lambda work: serve_all(loaded, config, work)[0]


def fixed() -> Serve:
    """`generate`, `FIXED_BATCH` requests at a time, each with its own limit."""
    loaded = load("smollm2-135m", dtype="float32")
    columns = -(-MAX_TOKENS // PAGE_SIZE)
    config = loaded.config.cache_config(
        num_pages=FIXED_BATCH * columns,
        page_size=PAGE_SIZE,
        max_seqs=FIXED_BATCH,
        max_pages_per_seq=columns,
        dtype="float32",
    )

    def run(work: Work) -> Served:
        seconds, tokens = 0.0, []
        for batch in work.slices(FIXED_BATCH):
            result = jaxkv.generate(
                loaded.model, batch.prompts, config, max_new_tokens=batch.new_tokens, warm_up=True
            )
            seconds += result.prefill_seconds + result.decode_seconds
            tokens += [samples[0] for samples in result.tokens]
        # Programs of other batches' sizes are of no further use.
        jax.clear_caches()
        return Served(seconds, tokens)

    return run
