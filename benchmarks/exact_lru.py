"""Prefix caching in plain Python: what can be found at best, and what a least-recently-used order keeps.

A page is a whole run of `PAGE_SIZE` tokens and all that precedes them. Pages are kept when they are recorded.
When no page is free, one that no sequence uses is reclaimed: the one left first by its last sequence, the end
of a text before its beginning. With a pool of unlimited size nothing is ever reclaimed, and no cache of whole
pages finds more.

`serve` runs requests through such a cache, or through another with the same five methods.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Protocol

from benchmarks.conversations import Request

PAGE_SIZE = 16
# Tokens that a running request decodes before the next turn of all that run.
STEP = 16

Tokens = Sequence[int]


class PrefixCache(Protocol):
    """What `serve` needs. Slots are numbered from 0."""

    def match(self, slot: int, prompt: Tokens) -> int:
        """Fills an empty slot with what is known of a prompt; returns how many tokens."""
        ...

    def prefill(self, slot: int, tokens: Tokens) -> None:
        """More tokens of one sequence."""
        ...

    def decode(self, tokens: Mapping[int, Tokens]) -> None:
        """More tokens of several, at most `STEP` of each."""
        ...

    def record(self, slot: int, tokens: Tokens) -> None:
        """Makes the whole pages of a sequence, of which these are all tokens, findable."""
        ...

    def free(self, slot: int) -> None:
        """Empties a slot."""
        ...


def serve(cache: PrefixCache, requests: Sequence[Request], in_flight: int = 1) -> int:
    """Runs requests in order of arrival, up to `in_flight` at a time.

    A request begins when a slot is free and its conversation has no other running: later ones do not wait for
    it. Its prompt is matched, the rest computed, and recorded; then all that run decode `STEP` tokens each in
    turns. What has all its tokens is recorded and freed.

    Returns:
      Tokens of prompts that were computed.
    """
    waiting, running = list(requests), dict[int, tuple[Request, int]]()
    computed = 0
    while waiting or running:
        for request in list(waiting):
            free = [slot for slot in range(in_flight) if slot not in running]
            if not free:
                break
            if any(request.conversation == other.conversation for other, _ in running.values()):
                continue
            waiting.remove(request)
            slot, prompt = free[0], request.prompt
            matched = cache.match(slot, prompt)
            cache.prefill(slot, prompt[matched:])
            cache.record(slot, prompt)
            computed += len(prompt) - matched
            running[slot] = request, 0
        more = {slot: request.answer[done : done + STEP] for slot, (request, done) in running.items()}
        cache.decode(more)
        for slot, (request, done) in list(running.items()):
            running[slot] = request, done + STEP
            if done + STEP >= len(request.answer):
                cache.record(slot, request.prompt + request.answer)
                cache.free(slot)
                del running[slot]
    return computed


class ExactLRU:
    """The cache in plain Python; a pool of `num_pages`, or without a limit."""

    def __init__(self, num_pages: int | None = None):
        self.num_pages = num_pages
        self.names: dict[tuple[int, tuple[int, ...]], int] = {}  # (name of the page before, tokens) -> name
        self.recorded: dict[int, int] = {}  # name -> page
        self.name_of: dict[int, int] = {}  # page -> name
        self.users: dict[int, int] = {}  # page -> sequences that have it
        self.queue: dict[
            int, None
        ] = {}  # recorded pages that no sequence has, the next to be reclaimed first
        self.new_pages = count()
        self.in_use = 0  # pages that a sequence has
        self.slots: dict[int, tuple[list[int], int]] = {}  # pages and number of tokens of each sequence

    def chain(self, tokens: Tokens) -> list[int]:
        """A name for each whole page of tokens with all that precedes it: equal if and only if these are."""
        names, name = [], -1
        for start in range(0, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
            key = name, tuple(tokens[start : start + PAGE_SIZE])
            name = self.names.setdefault(key, len(self.names))
            names.append(name)
        return names

    def match(self, slot: int, prompt: Tokens) -> int:
        assert slot not in self.slots
        pages = []
        for name in self.chain(prompt[: len(prompt) - 1]):
            if name not in self.recorded:
                break
            page = self.recorded[name]
            if page in self.queue:
                del self.queue[page]
                self.in_use += 1
            self.users[page] += 1
            pages.append(page)
        self.slots[slot] = pages, len(pages) * PAGE_SIZE
        return len(pages) * PAGE_SIZE

    def prefill(self, slot: int, tokens: Tokens) -> None:
        pages, length = self.slots[slot]
        length += len(tokens)
        while len(pages) * PAGE_SIZE < length:
            pages.append(self._take())
        self.slots[slot] = pages, length

    def decode(self, tokens: Mapping[int, Tokens]) -> None:
        for slot, more in tokens.items():
            self.prefill(slot, more)

    def record(self, slot: int, tokens: Tokens) -> None:
        pages, length = self.slots[slot]
        assert len(tokens) <= length
        for name, page in zip(self.chain(tokens), pages, strict=False):
            if name not in self.recorded and page not in self.name_of:
                self.recorded[name], self.name_of[page] = page, name

    def free(self, slot: int) -> None:
        pages, _ = self.slots.pop(slot)
        for page in reversed(pages):
            self.users[page] -= 1
            if not self.users[page]:
                self.in_use -= 1
                if page in self.name_of:
                    self.queue[page] = None

    def _take(self) -> int:
        if self.num_pages is not None and self.in_use + len(self.queue) == self.num_pages:
            if not self.queue:
                raise MemoryError(f"more than {self.num_pages} pages are in use")
            page = next(iter(self.queue))
            del self.queue[page]
            del self.recorded[self.name_of.pop(page)]
        page = next(self.new_pages)
        self.users[page] = 1
        self.in_use += 1
        return page


def pages_needed(requests: Sequence[Request]) -> int:
    """Different pages of all requests with their answers."""
    cache = ExactLRU()
    for request in requests:
        cache.chain(request.prompt + request.answer)
    return len(cache.names)


def pages_at_once(requests: Sequence[Request], in_flight: int) -> int:
    """Pages that so many of the longest requests use together."""
    longest = sorted((len(request.prompt + request.answer) for request in requests), reverse=True)
    return sum(-(-length // PAGE_SIZE) for length in longest[:in_flight])
