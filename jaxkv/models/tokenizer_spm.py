"""A SentencePiece vocabulary of the BPE kind, as a tokenizer of the `tokenizers` package.

Such a vocabulary has no list of merges: of all neighbours, those are merged whose concatenation is the piece
of the highest score. Spaces are written U+2581, and what the vocabulary lacks is spelled in bytes.
"""

from collections.abc import Collection, Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

SPACE = "\u2581"


def sentencepiece_bpe(
    tokens: Sequence[str], scores: Sequence[float], pieces: Collection[int], *, space_prefix: bool
) -> tokenizers.Tokenizer:
    """Builds the tokenizer, without its special tokens.

    Args:
      tokens: every token's text.
      scores: every token's score.
      pieces: ids of the tokens that merging may give.
      space_prefix: whether a text is read as if a space stood before it.
    """
    vocabulary = {token: number for number, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges(vocabulary, scores, pieces), byte_fallback=True)
    )
    replace = normalizers.Replace(" ", SPACE)
    prefix = [normalizers.Prepend(SPACE)] if space_prefix else []
    inner.normalizer = normalizers.Sequence([*prefix, replace])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return inner


def merges(
    vocabulary: Mapping[str, int], scores: Sequence[float], pieces: Collection[int]
) -> list[tuple[str, str]]:
    """Every pair of pieces whose concatenation is a piece, those of the highest score first."""
    allowed = {token for token, number in vocabulary.items() if number in pieces}
    found = []
    for token in allowed:
        score = scores[vocabulary[token]]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in allowed and right in allowed:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
