"""A SentencePiece vocabulary splits text as the plain algorithm does, and gives it back."""

import itertools
import random

import pytest

from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models import ModelLoadError
from jaxkv.models.tokenizer_gguf import gguf_tokenizer
from jaxkv.models.tokenizer_spm import SPACE
from tests.models import gguf_files

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = ["a", "b", "c", "é", SPACE]
LONGER = [
    "ab",
    "bc",
    SPACE + "a",
    "abc",
    "ca",
    SPACE + SPACE,
    "aa",
    "aaa",
    SPACE + "abc",
    "abca",
    "éa",
    "aab",
]
TOKENS = [*SPECIAL, "\n\n", *BYTES, *LONGER, *LETTERS]
SCORES = [-1000.0] * 4 + [0.0] * 256 + [-float(i) for i in range(len(LONGER) + len(LETTERS))]
TYPES = [CONTROL] * 3 + [USER_DEFINED] + [BYTE] * 256 + [NORMAL] * (len(LONGER) + len(LETTERS))


def tokenizer(tmp_path, **change):
    fields = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.scores": SCORES,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    fields |= {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    kept = {name: value for name, value in fields.items() if value is not None}
    return gguf_tokenizer(GGUFFile(gguf_files.write(tmp_path / "m.gguf", kept, {})))


def plain(text):
    """Merges the neighbours of the highest score, the leftmost of equal ones, until none are left."""
    parts = list(text.replace(" ", SPACE))
    while True:
        found = [
            (-SCORES[TOKENS.index(left + right)], at)
            for at, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in LONGER
        ]
        if not found:
            break
        at = min(found)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    spelled = [[part] if part in TOKENS else [BYTES[byte] for byte in part.encode()] for part in parts]
    return [TOKENS.index(part) for parts in spelled for part in parts]


def test_texts_are_split_as_by_the_plain_algorithm(tmp_path):
    inner, rng = tokenizer(tmp_path, add_space_prefix=False), random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("abcaé Ωb  ", k=rng.randint(0, 12)))
        assert inner.encode(text) == [1, *plain(text)], text
        assert inner.decode(inner.encode(text)) == text


def test_a_space_stands_before_a_text_unless_the_file_says_otherwise(tmp_path):
    inner = tokenizer(tmp_path)
    assert inner.encode("abc") == [1, *plain(" abc")]
    assert inner.decode(inner.encode("abc")) == "abc"


def test_defined_and_control_tokens_are_found_in_the_text(tmp_path):
    inner = tokenizer(tmp_path, add_space_prefix=False, add_bos_token=False)
    assert inner.encode("a\n\nb") == [*plain("a"), 3, *plain("b")]
    assert inner.encode("a</s>") == [*plain("a"), 2]
    assert 2 not in inner.encode("a</s>", parse_special=False)


def test_a_character_in_bytes_is_streamed_whole(tmp_path):
    inner = tokenizer(tmp_path, add_space_prefix=False)
    stream = inner.stream()
    pushed = [stream.push([token]) for token in inner.encode("aΩ b")]
    assert "".join(pushed) + stream.finish() == "aΩ b"
    assert all("\ufffd" not in text for text in pushed)


@pytest.mark.parametrize("scores", [None, [0.0], ["x"] * len(TOKENS)])
def test_scores_that_do_not_fit_are_refused(tmp_path, scores):
    with pytest.raises(ModelLoadError, match=r"tokenizer\.ggml\.scores must hold a score for each token"):
        tokenizer(tmp_path, scores=scores)
