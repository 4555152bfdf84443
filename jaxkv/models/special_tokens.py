"""Encodes untrusted text without parsing special tokens that are written in it.

A mark is inserted into each, so that the tokenizer's search does not match it. A copy of the tokenizer
removes the marks again before the text is split into tokens.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers

from jaxkv.errors import TokenizerError

# A noncharacter, which Unicode excludes from text.
MARK = "\ufdd0"


class PlainEncoder:
    """Encodes text in which marked special tokens are plain text.

    Args:
      inner: the tokenizer.
      templates: text of the chat templates. Added tokens in it structure a conversation, so they count as
        special.
    """

    def __init__(self, inner: tokenizers.Tokenizer, templates: str = ""):
        self.tokens = {
            number: token.content
            for number, token in inner.get_added_tokens_decoder().items()
            if token.special or (token.content in templates and not token.content.isspace())
        }
        texts = sorted(filter(None, self.tokens.values()))
        # Matches only the first character, so that overlapping occurrences are all found.
        self._whole = re.compile(
            "|".join(f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in texts) or "(?!)"
        )
        self._prefixes = {text[:size] for text in texts for size in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)
        self._inner, self._copy = inner, None
        self._unknown: int | None = None

    def mark(self, text: str) -> str:
        """The text with a mark in each special token, and in a prefix of one at the end of the text.

        A template may complete such a prefix with the text after it.
        """
        text = text.replace(MARK, "")
        ends = [
            size for size in range(1, min(self._longest, len(text) + 1)) if text[-size:] in self._prefixes
        ]
        for size in ends:  # the shortest first, so that the indices of the others stay valid
            text = text[: len(text) - size + 1] + MARK + text[len(text) - size + 1 :]
        return self._whole.sub(lambda found: found[0] + MARK, text)

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of a text with marks; special tokens without a mark are special."""
        # A normalizer may turn plain text into a special token, so text without marks needs the copy too.
        if MARK not in text and self._inner.normalizer is None:
            return self._inner.encode(text, add_special_tokens=add_special).ids
        if self._copy is None:
            self._copy, self._unknown = _without_marks(self._inner, self.tokens)
        return self._copy.encode(text, add_special_tokens=add_special).ids

    def encode_plain(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of a text without parsing special tokens.

        Raises:
          TokenizerError: if the tokenizer's model encodes plain text as a special token.
        """
        marked = self.mark(text)
        ids = self.encode(marked, add_special=add_special)
        inside = ids if not add_special else self.encode(marked, add_special=False)
        for token in inside:
            if token in self.tokens and token != self._unknown:
                raise TokenizerError(
                    f"the text spells special token {self.tokens[token]!r}, which this tokenizer can only "
                    "write as a special token"
                )
        return ids


def _without_marks(
    inner: tokenizers.Tokenizer, tokens: dict[int, str]
) -> tuple[tokenizers.Tokenizer, int | None]:
    """A copy that removes marks after the search for special tokens, and the id of the unknown token."""
    raw = json.loads(inner.to_str())
    for added in raw["added_tokens"]:
        # A normalized token would be searched for after the marks are removed.
        added["normalized"] = added["normalized"] and added["id"] not in tokens
    drop = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
    normalizers = [drop, raw["normalizer"]] if raw["normalizer"] else [drop]
    raw["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    _keep_from_merging(raw["model"], set(tokens.values()))
    copy = tokenizers.Tokenizer.from_str(json.dumps(raw))
    name = raw["model"].get("unk_token")
    return copy, raw["model"].get("unk_id") if name is None else copy.token_to_id(name)


def _keep_from_merging(model: dict[str, Any], texts: Iterable[str]) -> None:
    """Prevents SentencePiece vocabularies from merging characters into a special token."""
    texts = set(texts)
    if model.get("merges"):
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if "".join(pair) not in texts]
    if model.get("type") == "Unigram":
        # A score so low that any other segmentation is better.
        model["vocab"] = [[text, -1e6 if text in texts else score] for text, score in model["vocab"]]
