"""Builds the tokenizer of a GGUF file, whose metadata has vocabulary, merges and a name for the rest."""

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.checkpoints.hf_folder import shown
from jaxkv.errors import ModelLoadError
from jaxkv.models.splits import SPLITS
from jaxkv.models.tokenizer import Tokenizer
from jaxkv.models.tokenizer_spm import sentencepiece_bpe

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_END_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Tokens for chat templates, and their fields (one is misspelled in the format).
_NAMED = {"unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding", "cls_token": "cls"}
_NAMED |= {"mask_token": "mask"}


def gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """Builds the tokenizer of a GGUF file.

    Raises:
      ModelLoadError: for an unsupported kind of tokenizer, or damaged metadata, naming it.
    """
    kind = file.get("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise ModelLoadError(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not supported; supported: 'gpt2' (byte-level "
            "BPE), 'llama' (SentencePiece BPE)"
        )
    tokens = _strings(file, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise ModelLoadError(f"{file.path}: tokenizer.ggml.tokens holds a token twice")
    inner, starts_with_bos = _KINDS[kind](file, tokens)
    _add_special(file, inner, tokens)
    bos, eos = (_token(file, tokens, name) for name in ("bos_token_id", "eos_token_id"))
    if bos and file.get("tokenizer.ggml.add_bos_token", starts_with_bos):
        first = (tokens[bos[0]], bos[0])
        inner.post_processor = processors.TemplateProcessing(
            single=[first[0], "$A"], pair=[first[0], "$A", "$B"], special_tokens=[first]
        )
    ends = [_token(file, tokens, name) for name in _END_FIELDS]
    named = {name: _token(file, tokens, f"{field}_token_id") for name, field in _NAMED.items()}
    return Tokenizer(
        inner,
        stop_tokens={end[0] for end in ends if end},
        chat_template=_templates(file),
        bos=bos[1] if bos else "",
        eos=eos[1] if eos else "",
        special={name: token[1] for name, token in named.items() if token},
    )


def _byte_level_bpe(file: GGUFFile, tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether it prepends the begin-of-sequence token unless the file says otherwise."""
    pre = file.get("tokenizer.ggml.pre", "default")
    split = SPLITS.get(pre) if isinstance(pre, str) else None
    if split is None:
        raise ModelLoadError(
            f"{file.path}: tokenizer.ggml.pre {shown(pre)} is not supported; supported: {', '.join(SPLITS)}"
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = []
    for merge in _strings(file, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelLoadError(f"{file.path}: merge {merge!r} is not of the vocabulary")
        merges.append((left, right))
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.whole_words))
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in split.expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    inner.decoder = decoders.ByteLevel()
    if split.nfc:
        inner.normalizer = normalizers.NFC()
    return inner, split.starts_with_bos


def _sentencepiece(file: GGUFFile, tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """As `_byte_level_bpe`, from pieces and their scores."""
    scores, types = file.get("tokenizer.ggml.scores"), _types(file, tokens)
    valid = isinstance(scores, list) and all(isinstance(score, float) for score in scores)
    if not valid or len(scores) != len(tokens):
        raise ModelLoadError(f"{file.path}: tokenizer.ggml.scores must hold a score for each token")
    pieces = {token for token in range(len(tokens)) if not types or types[token] == _NORMAL}
    space_prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    return sentencepiece_bpe(tokens, scores, pieces, space_prefix=space_prefix), True


_KINDS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}


def _types(file: GGUFFile, tokens: Sequence[str]) -> list[int]:
    types = file.get("tokenizer.ggml.token_type", [])
    if types and len(types) != len(tokens):
        raise ModelLoadError(f"{file.path}: {len(types)} token types for {len(tokens)} tokens")
    return types


def _add_special(file: GGUFFile, inner: tokenizers.Tokenizer, tokens: Sequence[str]) -> None:
    types = _types(file, tokens)
    control = [tokens[i] for i, kind in enumerate(types) if kind == _CONTROL]
    defined = [tokens[i] for i, kind in enumerate(types) if kind == _USER_DEFINED]
    inner.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    inner.add_tokens([AddedToken(text, normalized=False) for text in defined])


def _templates(file: GGUFFile) -> dict[str, str] | None:
    """The chat templates by name; the main one is "default"."""
    fields = {"default": "tokenizer.chat_template"}
    if file.get("tokenizer.chat_templates") is not None:
        names = _strings(file, "tokenizer.chat_templates")
        fields |= {name: f"tokenizer.chat_template.{name}" for name in names}
    found = {name: file.get(field) for name, field in fields.items()}
    for name, template in found.items():
        if not isinstance(template, str | None):
            raise ModelLoadError(
                f"{file.path}: metadata {fields[name]!r} must be a text, not {template!r:.100}"
            )
    return {name: template for name, template in found.items() if template is not None} or None


def _strings(file: GGUFFile, name: str) -> list[str]:
    values = file.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ModelLoadError(f"{file.path}: metadata has no list of texts {name!r}")
    return values


def _token(file: GGUFFile, tokens: Sequence[str], name: str) -> tuple[int, str] | None:
    token = file.get(f"tokenizer.ggml.{name}")
    if token is None:
        return None
    if not isinstance(token, int) or not 0 <= token < len(tokens):
        raise ModelLoadError(f"{file.path}: tokenizer.ggml.{name} {token!r} is not a token")
    return token, tokens[token]
