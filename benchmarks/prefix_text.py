"""Greedy text of conversations with and without the prefix cache: SmolLM2 in float32, token for token.

The user says what the conversation's user said, `TURNS` times at most, and SmolLM2 answers. Turns of all
conversations are interleaved, and up to `AT_ONCE` of different conversations are one call of `generate`.
Where two answers differ, both chats go on with the one that was computed without the prefix cache.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import jaxkv
from benchmarks.conversations import MAX_TOKENS, Chat, arrivals
from benchmarks.exact_lru import PAGE_SIZE
from jaxkv.models import LoadedModel, load

TURNS, NEW_TOKENS, AT_ONCE = 4, 32, 4
# 540 MiB of K and V: pages of earlier conversations are reclaimed now and then.
NUM_PAGES = 768


class Text:
    """SmolLM2 behind a cache, with prefixes or without."""

    def __init__(self, loaded: LoadedModel, *, prefix_cache: bool):
        self.loaded, self.computed = loaded, 0
        rows = MAX_TOKENS // PAGE_SIZE
        config = loaded.config.cache_config(
            num_pages=NUM_PAGES if prefix_cache else AT_ONCE * rows,
            page_size=PAGE_SIZE,
            max_seqs=AT_ONCE,
            max_pages_per_seq=rows,
            dtype="float32",
            prefix_cache=prefix_cache,
        )
        self.cache = jaxkv.init(config)

    def answer(self, prompts: Sequence[list[int]]) -> tuple[list[list[int]], np.ndarray]:
        """New tokens of each prompt, and the logits that each token was drawn from."""
        assert self.loaded.tokenizer is not None
        padding = AT_ONCE - len(prompts)
        result = jaxkv.generate(
            self.loaded.model,
            # Always as many, and in chunks of one size, so that few programs are compiled.
            [*prompts, *[[0]] * padding],
            cache=self.cache,
            prefill_chunk=64,
            keep_logits=True,
            max_new_tokens=NEW_TOKENS,
            stop_tokens=self.loaded.tokenizer.stop_tokens,
        )
        self.cache = result.cache
        self.computed += result.prefill_tokens - padding
        return [tokens[0] for tokens in result.tokens[: len(prompts)]], np.asarray(result.logits)


def together(turns: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """`AT_ONCE` turns of different conversations at a time, those that came first; fewer at the end."""
    waiting = list(turns)
    while waiting:
        group: dict[int, int] = {}
        for conversation, turn in waiting:
            if len(group) < AT_ONCE:
                group.setdefault(conversation, turn)
        waiting = [of for of in waiting if of not in group.items()]
        yield list(group.items())


def compare(chats: Sequence[Chat]) -> dict[str, Any]:
    """Answers every turn both ways; prints each that differs, and how near its two tokens were."""
    loaded = load("smollm2-135m", dtype="float32")
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    without, with_cache = (Text(loaded, prefix_cache=on) for on in (False, True))
    spoken: list[Chat] = [[] for _ in chats]
    turns = new_tokens = 0
    differences, too_long = [], set()
    for group in together([(number, turn) for number, turn in arrivals(chats) if turn < TURNS]):
        prompts = {}
        for number, turn in group:
            spoken[number].append(chats[number][2 * turn])
            prompt = tokenizer.encode_chat(spoken[number], parse_special=False)
            if number in too_long or len(prompt) + NEW_TOKENS > MAX_TOKENS:
                too_long.add(number)
            else:
                prompts[number, turn] = prompt
        if not prompts:
            continue
        (expected, logits), (found, other) = (
            text.answer(list(prompts.values())) for text in (without, with_cache)
        )
        for (number, turn), right, ours, *rows in zip(prompts, expected, found, logits, other, strict=False):
            if ours != right:
                where = dict(conversation=number, turn=turn)
                differences.append(where | _difference(right, ours, rows))
                print(differences[-1], flush=True)
            spoken[number].append(dict(role="assistant", content=tokenizer.decode(right)))
            turns, new_tokens = turns + 1, new_tokens + len(right)
        print(f"\r{turns} turns", end="", file=sys.stderr)
    stats = with_cache.cache.stats.as_dict()
    print(
        f"\ngreedy text of {len(chats)} conversations, {turns} turns, {new_tokens:,} new tokens: "
        f"{len(differences)} turns differ\ntokens of prompts computed: {without.computed:,} without, "
        f"{with_cache.computed:,} with the cache; {stats['prefix_pages_reclaimed']:,} pages reclaimed"
    )
    return {
        "conversations": len(chats),
        "turns": turns,
        "new_tokens": new_tokens,
        "differences": differences,
        "computed_without": without.computed,
        "computed_with": with_cache.computed,
        "pages_reclaimed": stats["prefix_pages_reclaimed"],
    }


def _difference(expected: list[int], found: list[int], logits: Sequence[np.ndarray]) -> dict[str, Any]:
    pairs = zip(expected, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return dict(lengths=[len(expected), len(found)])
    tokens = [expected[at], found[at]]
    return dict(
        token=at, tokens=tokens, logit_gaps=[float(row[at][tokens[0]] - row[at][tokens[1]]) for row in logits]
    )
