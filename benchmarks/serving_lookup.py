"""What proposals from the prompt (`PromptLookup`) do for answers that repeat it: summaries, edits of code.

SmolLM2 in float32, greedy, one request at a time and eight at once, with proposals and without.
"""

from collections.abc import Callable
from typing import Any

from benchmarks import serving_ours
from benchmarks.serving_ours import serve_all
from benchmarks.serving_texts import EDITS, edits
from benchmarks.serving_work import Work
from jaxkv.models import LoadedModel, load
from jaxkv.serving import PromptLookup, ServingConfig, ServingState, ServingStats
from jaxkv.tune.timing import Sample, interleave, times

BATCHES, NEW_TOKENS, ROUNDS = (1, 8), 128, 3
LOOKUP = PromptLookup(ngram=3, num_tokens=4)
_MAX_PROMPT, _BUDGET = 352, 64


class Counts:
    """Of the steps that proposed something, and their tokens."""

    def __init__(self) -> None:
        self.steps, self.proposed, self.accepted = 0, 0, 0

    def __call__(self, state: ServingState) -> None:
        """See `on_state` of `serve`, which must look in after each step."""
        stats: ServingStats = state.stats
        proposed = int(stats.proposed_tokens)
        self.steps += proposed > self.proposed
        self.proposed, self.accepted = proposed, int(stats.accepted_tokens)


def measure(requests: int | None) -> dict[str, Any]:
    """Prints the table.

    Args:
      requests: at most so many prompts. Default: all eight, and for batches of one the first four.
    """
    loaded = load("smollm2-135m", dtype="float32")
    print(f"\nprompt lookup, n-grams of {LOOKUP.ngram}, up to {LOOKUP.num_tokens} tokens proposed")
    print(f"{'at once':>7}{'prompts':>9}{'accepted of proposed':>22}{'a step':>8}{'plain, t/s':>12}", end="")
    print(f"{'lookup, t/s':>13}{'faster':>22}{'same text':>11}")
    rows = []
    for batch in BATCHES:
        count = 4 if batch == 1 else len(EDITS)
        rows.append(_row(loaded, batch, min(count, requests or count), ROUNDS if requests is None else 1))
    return {"ngram": LOOKUP.ngram, "num_tokens": LOOKUP.num_tokens, "rows": rows}


def _row(loaded: LoadedModel, batch: int, count: int, rounds: int) -> dict[str, Any]:
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in edits(count)]
    work = Work(prompts, [NEW_TOKENS] * count)
    configs = {name: _config(loaded, batch, lookup) for name, lookup in (("plain", None), ("lookup", LOOKUP))}
    texts: dict[str, list[list[int]]] = {}

    def run(name: str) -> Callable[[], float]:
        serve_all(loaded, configs[name], Work(prompts[:1], [2]))

        def once() -> float:
            served, _ = serve_all(loaded, configs[name], work)
            texts[name] = served.tokens
            return served.seconds

        return once

    seconds = interleave({name: run(name) for name in configs}, rounds=rounds, warm_up=0)
    counts = Counts()
    serve_all(loaded, configs["lookup"], work, block=1, on_state=counts)
    speeds = {
        name: Sample(tuple(NEW_TOKENS * count / of for of in sample.rounds))
        for name, sample in seconds.items()
    }
    faster = speeds["lookup"].over(speeds["plain"])
    same = sum(a == b for a, b in zip(texts["plain"], texts["lookup"], strict=True)) / count
    a_step = counts.accepted / max(counts.steps, 1)
    of_proposed = counts.accepted / max(counts.proposed, 1)
    print(
        f"{batch:>7}{count:>9}{of_proposed:>22.0%}{a_step:>8.2f}{speeds['plain'].median:>12.1f}"
        f"{speeds['lookup'].median:>13.1f}{times(faster):>22}{same:>11.0%}",
        flush=True,
    )
    return {
        "batch": batch,
        "prompts": count,
        "steps_with_proposals": counts.steps,
        "proposed_tokens": counts.proposed,
        "accepted_tokens": counts.accepted,
        "accepted_a_step": a_step,
        "tokens_per_second": {name: speed.as_json() for name, speed in speeds.items()},
        "ratio": faster.as_json(),
        "same_text": same,
    }


def _config(loaded: LoadedModel, batch: int, lookup: PromptLookup | None) -> ServingConfig:
    """Compiled for steps that only decode, and for steps with prompts."""
    decoding = batch * (1 if lookup is None else 1 + lookup.num_tokens)
    return serving_ours.server(
        loaded,
        slots=batch,
        max_tokens=_MAX_PROMPT + NEW_TOKENS,
        token_budget=_BUDGET,
        widths=(decoding, _BUDGET),
        speculate=lookup,
    )
