"""Decodes tokens that arrive a few at a time, up to a stop string."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxkv.decode import Decoding, Finish

if TYPE_CHECKING:
    from jaxkv.models.tokenizer import Tokenizer

# The decoding of an incomplete character.
_REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes tokens that arrive a few at a time; delays text that later tokens may still change.

    The concatenated pieces equal `Tokenizer.decode` of all tokens, up to the first stop string. Delayed are
    an incomplete character, a prefix of a stop string, and, in vocabularies with byte tokens, a run of them
    until it ends, since an invalid byte changes the decoding of the whole run.

    Args:
      tokenizer: of the tokens.
      stop: texts that end the stream. The first complete one counts, of several the longest; neither it nor
        what follows is returned.

    Example:
      >>> from jaxkv.models import load
      >>> stream = load("smollm2-135m").tokenizer.stream()
      >>> [stream.push([token]) for token in stream.tokenizer.encode("A \u2615!")]
      ['A', ' ', '', '\u2615', '!']
    """

    def __init__(self, tokenizer: "Tokenizer", stop: Iterable[str] = ()):
        added = tokenizer.inner.get_added_tokens_decoder()
        self.tokenizer = tokenizer
        self._special = {number for number, token in added.items() if token.special}
        self._has_byte_tokens = _has_byte_tokens(tokenizer)
        self._stop = checked_stop(stop)
        self._restart()

    def _restart(self) -> None:
        # The newest returned tokens, as many as later text depends on; how much of their text was returned;
        # and the delayed tokens.
        self._context: list[int] = []
        self._shown = 0
        self._waiting: list[int] = []
        self._search = _StopSearch(self._stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._search.found

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty."""
        first = len(self._waiting)
        self._waiting += [token for token in self.tokenizer.checked(ids) if self._is_text(token)]
        end = self._end_of_complete(first)
        if self.stopped or not end:
            return ""
        tokens = self._context + self._waiting[:end]
        del self._waiting[:end]
        text = self._decode(tokens)
        piece = text[self._shown : _settled(text)]
        self._context = self._newest(tokens)
        self._shown = _settled(self._decode(self._context))
        return self._search.push(piece)

    def flush(self) -> str:
        """The delayed text; resets the stream."""
        rest = self.finish()
        self._restart()
        return rest

    def finish(self) -> str:
        """The delayed text, after the last token; then `stopped` is final."""
        if self.stopped:
            return ""
        rest = self._search.push(self._decode(self._context + self._waiting)[self._shown :])
        return rest + self._search.rest()

    def _is_text(self, token: int) -> bool:
        """Whether `decode` uses the token; it drops special and unknown ones."""
        return token not in self._special and self.tokenizer.inner.id_to_token(token) is not None

    def _end_of_complete(self, first: int) -> int:
        """Number of tokens that need no delay. Those before `first` are of an open run of bytes."""
        if not self._has_byte_tokens:
            return len(self._waiting)
        for end in range(len(self._waiting), first, -1):
            if not _is_byte(self.tokenizer.inner.id_to_token(self._waiting[end - 1])):
                return end
        return 0

    def _newest(self, tokens: list[int]) -> list[int]:
        """The last four non-empty tokens, since a UTF-8 character has at most four bytes.

        All tokens if these have no text: the first text may lose a space that later text keeps.
        """
        kept, start = 0, len(tokens)
        while start and kept < 4:
            start -= 1
            kept += bool(self.tokenizer.inner.id_to_token(tokens[start]))
        return tokens[start:] if self._decode(tokens[start:]) else tokens

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens) if tokens else ""


class TextStreams:
    """Decodes every sequence of a generation as its tokens arrive, and ends it at a stop string.

    Pass it to `generate` as `on_tokens`, which calls it after each block of tokens.

        texts = TextStreams(tokenizer, stop=["\\n\\n", "User:"])
        result = generate(model, prompts, on_tokens=texts, stop_tokens=tokenizer.stop_tokens)
        texts.texts

    `result.tokens` may continue after a stop string to the end of its block.

    Args:
      tokenizer: the model's.
      stop: as in `TextStream`, for every sequence.

    Attributes:
      texts: the text of each sequence so far, prompt by prompt and sample by sample, cut at the stop string.
      pieces: the text that the last call added to each.
    """

    def __init__(self, tokenizer: "Tokenizer", stop: Iterable[str] = ()):
        self._tokenizer, self._stop = tokenizer, checked_stop(stop)
        self._streams: list[TextStream] = []
        self._counts: list[int] = []
        self._ended: list[bool] = []
        self.texts: list[str] = []
        self.pieces: list[str] = []

    def __call__(self, state: Decoding) -> np.ndarray:
        """Decodes the new tokens; returns which sequences a stop string ends."""
        counts, output = np.asarray(state.num_generated).tolist(), np.asarray(state.output)
        finished = np.asarray(state.finish) != Finish.RUNNING
        if not self._streams:
            self._streams = [TextStream(self._tokenizer, self._stop) for _ in counts]
            self._counts, self._ended = [0] * len(counts), [False] * len(counts)
            self.texts = [""] * len(counts)
        self.pieces = [""] * len(counts)
        found = [
            self._take(row, output[row, self._counts[row] : count].tolist(), bool(finished[row]))
            for row, count in enumerate(counts)
        ]
        self._counts = counts
        return np.array(found)

    def _take(self, row: int, tokens: list[int], finished: bool) -> bool:
        """Extends one text; returns whether it ends with a stop string."""
        if self._ended[row]:
            return False
        stream = self._streams[row]
        piece = stream.push(tokens)
        if finished:
            piece += stream.finish()
        self.pieces[row] = piece
        self.texts[row] += piece
        self._ended[row] = finished or stream.stopped
        return stream.stopped


class _StopSearch:
    """Passes text through up to a stop string; delays text that may become one."""

    def __init__(self, stop: tuple[str, ...]):
        self._stop = stop
        self._delayed = ""
        self.found = False

    def push(self, text: str) -> str:
        if self.found:
            return ""
        if not self._stop:
            return text
        text = self._delayed + text
        # The first complete one, of several the longest: the result does not depend on blocks.
        ends = [(at + len(stop), -len(stop)) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            end, minus_size = min(ends)
            self.found, self._delayed = True, ""
            return text[: end + minus_size]
        size = max(_overlap(text, stop) for stop in self._stop)
        self._delayed = text[len(text) - size :]
        return text[: len(text) - size]

    def rest(self) -> str:
        """The delayed text, when nothing follows."""
        return "" if self.found else self._delayed


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a prefix of the stop string."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def checked_stop(stop: Iterable[str]) -> tuple[str, ...]:
    """Stop strings as a tuple; raises `ValueError` for one that is empty or not a string."""
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop={text!r}: a stop string must be a text that is not empty")
    return texts


def _settled(text: str) -> int:
    """Length of the text without a last character that may be incomplete."""
    return len(text) - text.endswith(_REPLACEMENT)


def _has_byte_tokens(tokenizer: "Tokenizer") -> bool:
    return b'"ByteFallback"' in tokenizer.inner.decoder.__getstate__() if tokenizer.inner.decoder else False


def _is_byte(token: str | None) -> bool:
    """Whether the ByteFallback decoder treats it as a byte."""
    return bool(token and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token))
