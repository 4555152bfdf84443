"""What the prefix cache does for requests with one system prompt: time to the first token, tokens per second.

A system prompt of 512 tokens stands before short questions, which all come at once. SmolLM2 in float32,
greedy; every round begins with an empty cache.
"""

import statistics
from typing import Any

from benchmarks import serving_ours
from benchmarks.serving_ours import serve_all
from benchmarks.serving_texts import QUESTIONS, SYSTEM
from benchmarks.serving_work import Served, Work
from jaxkv.models import Tokenizer, load
from jaxkv.tune.timing import Sample, interleave, times

NEW_TOKENS, SYSTEM_TOKENS, ROUNDS = 32, 512, 3
_MAX_TOKENS = SYSTEM_TOKENS + 96
_BLOCK = 4


def work_of(tokenizer: Tokenizer, count: int) -> Work:
    """So many questions, each after the system prompt."""
    tokens = tokenizer.encode(SYSTEM, add_special=False, parse_special=False)
    if len(tokens) < SYSTEM_TOKENS:
        raise ValueError(f"the system prompt has {len(tokens)} tokens, fewer than {SYSTEM_TOKENS}")
    system = {"role": "system", "content": tokenizer.decode(tokens[:SYSTEM_TOKENS])}
    prompts = [
        tokenizer.encode_chat([system, {"role": "user", "content": question}], parse_special=False)
        for question in QUESTIONS[:count]
    ]
    return Work(prompts, [NEW_TOKENS] * len(prompts))


def measure(requests: int | None) -> dict[str, Any]:
    """Prints the table.

    Args:
      requests: how many. Default: as many as there are questions, 64.
    """
    loaded = load("smollm2-135m", dtype="float32")
    assert loaded.tokenizer is not None
    work = work_of(loaded.tokenizer, len(QUESTIONS) if requests is None else requests)
    done: dict[bool, list[tuple[Served, list[float]]]] = {False: [], True: []}
    matched = {}

    def server(on: bool):
        config = serving_ours.server(
            loaded,
            slots=serving_ours.SLOTS,
            max_tokens=_MAX_TOKENS,
            token_budget=serving_ours.WIDTHS[-1],
            widths=serving_ours.WIDTHS,
            prefix_cache=on,
        )

        def keep(state):
            matched[on] = int(state.stats.matched_tokens)

        # Compiles.
        serve_all(loaded, config, Work(work.prompts[:1], [2]), block=_BLOCK)

        def run() -> float:
            done[on].append(serve_all(loaded, config, work, block=_BLOCK, on_state=keep))
            return done[on][-1][0].seconds

        return run

    rounds = ROUNDS if requests is None else 1
    seconds = interleave({on: server(on) for on in done}, rounds=rounds, warm_up=0)
    tokens = sum(work.new_tokens)
    print(f"\n{len(work.prompts)} requests behind a system prompt of {SYSTEM_TOKENS} tokens, {tokens:,} new")
    print(f"{'prefix cache':<14}{'found':>8}{'first token, median, s':>24}{'95%, s':>10}{'tokens/s':>10}")
    rows = []
    for on, runs in done.items():
        median = Sample(tuple(statistics.median(first) for _, first in runs))
        late = Sample(tuple(_percentile(first, 0.95) for _, first in runs))
        speed = Sample(tuple(tokens / of for of in seconds[on].rounds))
        print(
            f"{'with' if on else 'without':<14}{matched[on]:>8,}{median.median:>24.2f}{late.median:>10.2f}"
            f"{speed.median:>10.1f}"
        )
        rows.append(
            {
                "prefix_cache": on,
                "matched_tokens": matched[on],
                "first_token_median": median.as_json(),
                "first_token_p95": late.as_json(),
                "tokens_per_second": speed.as_json(),
            }
        )
    pairs = list(zip(done[False][0][0].tokens, done[True][0][0].tokens, strict=True))
    same, faster = sum(a == b for a, b in pairs) / len(pairs), seconds[False].over(seconds[True])
    print(f"with it {times(faster)} as fast; {same:.0%} of texts are the same", flush=True)
    return {
        "requests": len(work.prompts),
        "prompt_tokens": sum(map(len, work.prompts)),
        "rows": rows,
        "ratio": faster.as_json(),
        "same_text": same,
    }


def _percentile(values: list[float], share: float) -> float:
    """The least value that this share of all values does not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
