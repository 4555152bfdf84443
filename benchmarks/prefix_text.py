"""Greedy text of conversations with and without the prefix cache: SmolLM2 in float32, token for token.

The user says what the conversation's user said, and SmolLM2 answers. Turns of all conversations are
interleaved, each turn is a call of `generate`, and both caches serve one sequence at a time. Where two
answers differ, both chats go on with the one that was computed without the prefix cache.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import jaxkv
from benchmarks.conversations import MAX_TOKENS, Chat, arrivals
from benchmarks.exact_lru import PAGE_SIZE
from benchmarks.prefix_runs import int32, padded
from jaxkv.models import load

NEW_TOKENS = 32
# Reclaims pages of earlier conversations now and then; 45 MiB of K and V for 1,024 tokens.
NUM_PAGES = 512


class Text:
    """SmolLM2 behind a cache, with prefixes or without."""

    def __init__(self, loaded: Any, *, prefix_cache: bool):
        self.loaded, self.computed = loaded, 0
        config = loaded.config.cache_config(
            num_pages=NUM_PAGES if prefix_cache else MAX_TOKENS // PAGE_SIZE,
            page_size=PAGE_SIZE,
            max_seqs=1,
            max_pages_per_seq=MAX_TOKENS // PAGE_SIZE,
            dtype="float32",
            prefix_cache=prefix_cache,
        )
        self.cache = jaxkv.init(config)

    def answer(self, prompt: list[int]) -> tuple[list[int], np.ndarray]:
        """New tokens, and the logits that each was drawn from."""
        matched, prefix_cache, slot = 0, self.cache.config.prefix_cache, int32([0])
        if prefix_cache:
            self.cache, found = _match(self.cache, slot, *padded(prompt))
            matched = int(found[0])
        result = jaxkv.generate(
            self.loaded.model,
            [prompt[matched:]],
            cache=self.cache,
            seqs=[0],
            keep=True,
            keep_logits=True,
            max_new_tokens=NEW_TOKENS,
            stop_tokens=self.loaded.tokenizer.stop_tokens,
        )
        new = result.tokens[0][0]
        self.cache = result.cache
        if prefix_cache:
            self.cache = _record(self.cache, slot, *padded(prompt + new[:-1]))
        self.cache = _free(self.cache, slot)
        self.computed += len(prompt) - matched
        return new, np.asarray(result.logits)[0]


_match = jax.jit(jaxkv.match_prefix, donate_argnums=0)
_record = jax.jit(jaxkv.record_prefix, donate_argnums=0)
_free = jax.jit(jaxkv.free, donate_argnums=0)


def compare(chats: Sequence[Chat]) -> dict[str, Any]:
    """Answers every turn both ways; prints each that differs, and how near its two tokens were."""
    loaded = load("smollm2-135m", dtype="float32")
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    without, with_cache = (Text(loaded, prefix_cache=on) for on in (False, True))
    spoken: list[Chat] = [[] for _ in chats]
    turns = new_tokens = 0
    differences, too_long = [], set()
    for number, turn in arrivals(chats):
        if number in too_long:
            continue
        spoken[number].append(chats[number][2 * turn])
        prompt = tokenizer.encode_chat(spoken[number], parse_special=False)
        if len(prompt) + NEW_TOKENS > MAX_TOKENS:
            too_long.add(number)
            continue
        (expected, logits), (found, other) = (text.answer(prompt) for text in (without, with_cache))
        if found != expected:
            differences.append(_difference(number, turn, expected, found, logits, other))
            print(differences[-1])
        spoken[number].append(dict(role="assistant", content=tokenizer.decode(expected)))
        turns, new_tokens = turns + 1, new_tokens + len(expected)
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


def _difference(number: int, turn: int, expected, found, logits, other) -> dict[str, Any]:
    pairs = zip(expected, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    tokens = [tokens[at] for tokens in (expected, found)]
    gaps = [float(row[at][tokens[0]] - row[at][tokens[1]]) for row in (logits, other)]
    return {"conversation": number, "turn": turn, "token": at, "tokens": tokens, "logit_gaps": gaps}
