"""Texts are split before they are merged as the files' `tokenizer.ggml.pre` says."""

import pytest
from tokenizers import Regex, pre_tokenizers

from jaxkv.models.splits import SPLITS

CAMEL = "HTTPServer's fooBar ÉCOLEété 12345.\n//\n x"


def pieces(name, text):
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in SPLITS[name].expressions]
    return [piece for piece, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", "HTTPServer|'s| fooBar| ÉCOLEété| 12345|.|\n|//|\n| x"),
        ("smollm", "HTTPServer|'s| fooBar| ÉCOLEété| |1|2|3|4|5|.|\n|//|\n| x"),
        ("llama-bpe", "HTTPServer|'s| fooBar| ÉCOLEété| |123|45|.\n|//\n| x"),
        ("qwen2", "HTTPServer|'s| fooBar| ÉCOLEété| |1|2|3|4|5|.\n|//\n| x"),
        ("seed-coder", "HTTPServer|'s| fooBar| ÉCOLEété| |1|2|3|4|5|.|\n|//|\n| x"),
        ("tekken", "HTTPServer|'s| foo|Bar| ÉCOLEété| |1|2|3|4|5|.\n//\n| x"),
        ("gpt-4o", "HTTPServer's| foo|Bar| ÉCOLEété| |123|45|.\n//\n| x"),
    ],
)
def test_a_text_is_split_as_named(name, expected):
    assert pieces(name, CAMEL) == expected.split("|")


def test_contractions_end_words_whatever_their_case():
    assert pieces("llama-bpe", "I'M HE'LL") == ["I", "'M", " HE", "'LL"]
    assert pieces("gpt-4o", "I'M HE'LL") == ["I'M", " HE'LL"]
    assert pieces("gpt-2", "I'M") == ["I", "'", "M"]


def test_names_of_one_split_share_it_and_what_goes_with_it():
    assert SPLITS["falcon3"] is SPLITS["llama-bpe"] and SPLITS["falcon3"].starts_with_bos
    assert SPLITS["glm4"].expressions == SPLITS["llama-bpe"].expressions
    assert not SPLITS["glm4"].starts_with_bos and not SPLITS["glm4"].whole_words
