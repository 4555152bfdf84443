"""Beam search in plain Python, on whole texts: what `jaxkv.beam_search` is compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Text: TypeAlias = tuple[int, ...]


@dataclass
class ByHand:
    """The result of a beam search, best first, and the beams of each step that the model ran on."""

    tokens: list[list[int]]
    scores: list[float]
    steps: list[list[Text]]


def by_hand(
    log_probs: Callable[[list[Text]], np.ndarray],
    prompt: Sequence[int],
    width: int,
    *,
    limit: int,
    stops: Sequence[int] = (),
    penalty: float = 1.0,
    early: bool | str = False,
    most_steps: int = 1000,
) -> ByHand:
    """Beam search as `jaxkv.beam_search` documents it.

    `log_probs` gives those of the token after each text, `[texts, vocab]`. The search ends before the model
    would run for the `most_steps`-th time, as if pages had run out.
    """
    beams, pool, steps = [((), np.float32(0))], [], []

    def enter(pool, text, total):
        return sorted([*pool, (text, total / len(text) ** penalty)], key=lambda one: -one[1])[:width]

    while True:
        texts = [(*prompt, *text) for text, _ in beams]
        if beams[0][0]:
            if len(steps) == most_steps:
                for text, total in beams:
                    pool = enter(pool, text, total)
                break
            steps.append(texts)
        sums = np.array([total for _, total in beams], np.float32)[:, None] + log_probs(texts)
        order = np.argsort(-sums.reshape(-1), kind="stable")[: width * max(2, 1 + len(stops))]
        length, following = len(beams[0][0]) + 1, []
        for rank, (beam, token) in enumerate(zip(*np.unravel_index(order, sums.shape), strict=True)):
            text, total = (*beams[beam][0], int(token)), sums[beam, token]
            if token in stops or length == limit:
                pool = enter(pool, text, total) if rank < width else pool
            else:
                following.append((text, total))
        beams = following[:width]
        if not beams or (early is True and len(pool) == width):
            break
        best_length = limit if early == "never" and penalty > 0 else length
        if len(pool) == width and beams[0][1] / best_length**penalty <= pool[-1][1]:
            break
    return ByHand([list(text) for text, _ in pool], [float(score) for _, score in pool], steps)
