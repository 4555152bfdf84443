"""Small tokenizers of the kinds that models have, made by hand: every token is known."""

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from jaxkv.models import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
# Merged from two halves each. "</s>" has such a way too, as vocabularies from SentencePiece may have.
_MERGES = ["▁ H", "▁H i", "▁ w", "l o", "▁w o", "< /", "s >", "</ s>"]
_MERGED = ["▁H", "▁Hi", "▁w", "lo", "▁wo", "</", "s>"]
_PIECES = [*"▁Hiwolrd<>/|_abcnestmu.,\n", *_MERGED, "▁▁", "�", "é", "日本"]


def byte_level() -> Tokenizer:
    """As GPT-2's: every byte is a token, and some tokens are several bytes that cut a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("â", "ĺ"), ("ð", "Ł"), ("ĺ", "ĥ"), ("ĥ", "â"), ("ï", "¿"), ("ï¿", "½")]
    texts = [*SPECIAL[1:], *letters, *("".join(pair) for pair in merges)]
    inner = tokenizers.Tokenizer(models.BPE(vocab={text: n for n, text in enumerate(texts)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL[1:])
    inner.add_tokens([AddedToken("<think> ☃", normalized=False)])
    return Tokenizer(inner)


def byte_fallback(*, metaspace: bool = False) -> Tokenizer:
    """As SentencePiece's: texts with ▁ for a space, and bytes for what has no token."""
    texts = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(_PIECES)]
    merges = [tuple(merge.split(" ")) for merge in _MERGES]
    model = models.BPE(
        vocab={text: n for n, text in enumerate(texts)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    inner = tokenizers.Tokenizer(model)
    if metaspace:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        inner.decoder = decoders.Sequence(parts)
    inner.add_special_tokens(SPECIAL)
    return Tokenizer(inner)


def word_level() -> Tokenizer:
    """Whole words, with no decoder: the texts are joined by spaces."""
    texts = ["<unk>", *SPECIAL[1:], "Hello", "world", ".", ""]
    inner = tokenizers.Tokenizer(models.WordLevel({text: n for n, text in enumerate(texts)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(SPECIAL)
    return Tokenizer(inner)


def unigram() -> Tokenizer:
    """As T5's: "</s>" is a piece of the model like any other, and the best one for its text."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((text, -3.0 - n) for n, text in enumerate("▁Hi</s>a"))]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(inner)


KINDS = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "metaspace": byte_fallback(metaspace=True),
    "word_level": word_level(),
    "unigram": unigram(),
}
