"""Special tokens that are written out in text from others: kept from being parsed as such.

A mark is put into each of them, which the tokenizer's own search then does not match. A copy of the
tokenizer takes the marks out again before the text is cut into tokens.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers

from jaxkv.errors import TokenizerError

# A noncharacter: Unicode promises that no text has it.
MARK = "\ufdd0"


class PlainEncoder:
    """Encodes text in which some special tokens are text, and others are special.

    Args:
      inner: the tokenizer.
      templates: text of the chat templates. Added tokens in it structure a conversation, so they are taken
        like special ones.
    """

    def __init__(self, inner: tokenizers.Tokenizer, templates: str = ""):
        self.tokens = {
            number: token.content
            for number, token in inner.get_added_tokens_decoder().items()
            if token.special or (token.content in templates and not token.content.isspace())
        }
        texts = sorted(filter(None, self.tokens.values()))
        # Only the first character is matched, so occurrences that overlap are all found.
        self._whole = re.compile(
            "|".join(f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in texts) or "(?!)"
        )
        self._prefixes = {text[:size] for text in texts for size in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)
        self._inner, self._copy = inner, None
        self._unknown: int | None = None

    def mark(self, text: str) -> str:
        """The text with a mark in each special token, and in a beginning of one at the text's end.

        The latter because a template may write another text right behind it.
        """
        text = text.replace(MARK, "")
        ends = [
            size for size in range(1, min(self._longest, len(text) + 1)) if text[-size:] in self._prefixes
        ]
        for size in ends:  # the shortest first: the places of the others stay
            text = text[: len(text) - size + 1] + MARK + text[len(text) - size + 1 :]
        return self._whole.sub(lambda found: found[0] + MARK, text)

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of a text with marks in it: special tokens without a mark are special.

        Raises:
          TokenizerError: where the tokenizer's model makes a special token of plain text.
        """
        # A normalizer may make a special token of what was none, so text without marks is no safer.
        if MARK not in text and self._inner.normalizer is None:
            return self._inner.encode(text, add_special_tokens=add_special).ids
        if self._copy is None:
            self._copy, self._unknown = _without_marks(self._inner, self.tokens)
        return self._copy.encode(text, add_special_tokens=add_special).ids

    def encode_plain(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of a text in which no special token is special; raises as `encode`."""
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
    """A copy that drops marks after special tokens are found; and the id of the unknown token."""
    raw = json.loads(inner.to_str())
    for added in raw["added_tokens"]:
        # A normalized token would be searched for after the marks are gone.
        added["normalized"] = added["normalized"] and added["id"] not in tokens
    drop = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
    normalizers = [drop, raw["normalizer"]] if raw["normalizer"] else [drop]
    raw["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    _keep_from_merging(raw["model"], set(tokens.values()))
    copy = tokenizers.Tokenizer.from_str(json.dumps(raw))
    name = raw["model"].get("unk_token")
    return copy, raw["model"].get("unk_id") if name is None else copy.token_to_id(name)


def _keep_from_merging(model: dict[str, Any], texts: Iterable[str]) -> None:
    """Vocabularies from SentencePiece may build a special token out of its characters."""
    texts = set(texts)
    if model.get("merges"):
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if "".join(pair) not in texts]
    if model.get("type") == "Unigram":
        # A score so low that any other way to write it is better.
        model["vocab"] = [[text, -1e6 if text in texts else score] for text, score in model["vocab"]]
