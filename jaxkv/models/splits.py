"""How byte-level tokenizers split a text before they merge, by llama.cpp's names (`tokenizer.ggml.pre`).

The names and what goes with them are those of llama.cpp's `src/llama-vocab.cpp`. The expressions are those of
the models' own tokenizer files, which llama.cpp quotes beside its adaptations: for "tekken" and "gpt-4o" the
adaptation tells capitals from small letters in ASCII only.
"""

import dataclasses

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
)  # fmt: skip
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SEED = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = (r"\p{N}", _GPT2)

# Words of capitals and then small letters, of at least one of the latter or of the former.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_TEKKEN = "|".join(_CASED) + r"|\p{N}" + _CASED_REST
_GPT4O = "|".join(word + _CONTRACTIONS + "?" for word in _CASED) + r"|\p{N}{1,3}" + _CASED_REST


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One way to split a text.

    Attributes:
      expressions: applied one after the other, each to the pieces of those before.
      whole_words: whether a piece that is a token is taken as it is, whatever the merges make of it.
      starts_with_bos: whether the begin-of-sequence token is prepended, unless the file says otherwise.
      nfc: whether characters are composed first (Unicode's form NFC).
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    starts_with_bos: bool = False
    nfc: bool = False


SPLITS = {
    "default": Split(expressions=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": Split(expressions=(_GPT2,)),
    "smollm": Split(expressions=_DIGITS),
    "llama-bpe": Split(expressions=(_LLAMA3,), whole_words=True, starts_with_bos=True),
    "dbrx": Split(expressions=(_LLAMA3,)),
    "qwen2": Split(expressions=(_QWEN2,), nfc=True),
    "seed-coder": Split(expressions=(_SEED,)),
    "tekken": Split(expressions=(_TEKKEN,), whole_words=True, starts_with_bos=True),
    "gpt-4o": Split(expressions=(_GPT4O,)),
}
_SAME = {
    "gpt-2": ("olmo", "exaone4"),
    "smollm": ("starcoder", "refact", "command-r"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral"),
    "dbrx": ("smaug-bpe", "glm4", "chatglm-bpe"),
    "qwen2": ("deepseek-r1-qwen",),
    "gpt-4o": ("llama4",),
}
SPLITS |= {other: SPLITS[name] for name, others in _SAME.items() for other in others}
