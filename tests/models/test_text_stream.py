"""Text that arrives token by token equals the text of all tokens, and ends before a stop string."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.decode import Finish
from jaxkv.models import TextStream, TextStreams, Tokenizer
from tests.models.text_tokenizers import KINDS


def streamed(tokenizer: Tokenizer, ids, cuts=(), stop=()) -> list[str]:
    """The pieces that a stream gives, one token at a time or cut as said."""
    stream, pieces, ids = tokenizer.stream(stop), [], list(ids)
    for cut in cuts or [1] * len(ids):
        pieces.append(stream.push(ids[:cut]))
        ids = ids[cut:]
    return [*pieces, stream.push(ids), stream.flush()]


def some_ids(tokenizer: Tokenizer):
    """Any tokens, most of them parts of characters, special tokens and ids that nothing has."""
    vocab = tokenizer.inner.get_vocab()
    parts = [token for text, token in vocab.items() if not text.isascii() or text.startswith("<")]
    return st.lists(
        st.one_of(st.sampled_from(parts), st.integers(0, len(vocab) + 2), st.sampled_from([1, 2])),
        max_size=40,
    )


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_streamed_text_is_the_text_of_all_tokens_for_any_tokens(kind, data):
    tokenizer = KINDS[kind]
    ids = data.draw(some_ids(tokenizer))
    cuts = data.draw(st.lists(st.integers(0, 7), max_size=12))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
    assert "".join(streamed(tokenizer, ids, cuts)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
@given(text=st.text(alphabet="Hi wo☃日é😀\ufffd<\n", max_size=30))
@settings(max_examples=100, deadline=None)
def test_streamed_text_is_the_text_of_real_texts(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_special_token_in_the_middle_keeps_the_next_space():
    for kind in ("byte_fallback", "metaspace"):
        tokenizer = KINDS[kind]
        ids = [*tokenizer.encode("Hi"), 4, *tokenizer.encode("wo")]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "Hi wo"


def test_many_tokens_in_a_row_that_each_end_in_mid_character_show_no_replacement():
    tokenizer = KINDS["byte_level"]
    vocab = tokenizer.inner.get_vocab()
    # E2 98 83 is a snowman. Of E2 | 98 | 83 E2 | 98 | 83 E2 ... none ends where a character does.
    ids = [vocab["â"], *[vocab["ĺ"], vocab["ĥâ"]] * 40, vocab["ĺĥ"]]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == "☃" * 41 == tokenizer.decode(ids)
    assert pieces[:6] == ["", "", "☃", "", "☃", ""]  # shown as soon as they are whole


def test_a_run_of_bytes_waits_until_it_is_clear_whether_it_is_text():
    tokenizer = KINDS["byte_fallback"]
    byte = {value: tokenizer.inner.token_to_id(f"<0x{value:02X}>") for value in range(256)}
    hi = tokenizer.inner.token_to_id("▁Hi")
    stream = tokenizer.stream()
    pieces = [stream.push([token]) for token in (hi, byte[0xE2], byte[0x98], byte[0x83], hi)]
    assert pieces == ["Hi", "", "", "", "☃ Hi"]
    # One byte more and all four are replacement characters, which could not be known before.
    pieces = [stream.push([token]) for token in (byte[0xE2], byte[0x98], byte[0x83], byte[0xFF], hi)]
    assert pieces == ["", "", "", "", "\ufffd" * 4 + " Hi"]


@pytest.mark.parametrize(
    ("kind", "parts"), [("byte_level", ["ðŁ", "ĺ"]), ("byte_fallback", ["<0xE2>", "<0x41>"])]
)
def test_the_cost_of_a_stream_is_linear_in_its_tokens(kind, parts):
    """Also where no token ever ends with a whole character."""
    inner, decoded = KINDS[kind].inner, 0

    class Counting(Tokenizer):
        def decode(self, ids, **options):
            nonlocal decoded
            decoded += len(ids)
            return super().decode(ids, **options)

    ids = [inner.token_to_id(text) for text in parts] * 2000
    streamed(Counting(inner), ids)
    assert decoded < 15 * len(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(
    text=st.text(alphabet="ab<é\n", max_size=40),
    stop=st.lists(st.text("ab<é\n", min_size=1, max_size=5), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_are_cut(kind, text, stop):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    ends = [(whole.index(one) + len(one), -len(one)) for one in stop if one in whole]
    expected = whole[: sum(min(ends))] if ends else whole
    assert "".join(streamed(tokenizer, ids, stop=stop)) == expected
    assert "".join(streamed(tokenizer, ids, [3] * 20, stop=stop)) == expected


def test_no_part_of_a_stop_string_is_ever_shown():
    tokenizer = KINDS["byte_level"]
    stream = tokenizer.stream(["<|end|>", "\n\n"])
    shown = [stream.push([token]) for token in tokenizer.encode("a<|eb\n<|end|>tail")]
    assert shown[:6] == ["a", "", "", "", "<|eb", ""]
    assert "".join(shown) == "a<|eb\n" and stream.stopped
    assert stream.flush() == "" and not stream.stopped
    # What turns out to be none is shown at the end at the latest.
    assert stream.push(tokenizer.encode("b\n")) == "b" and stream.flush() == "\n"


@pytest.mark.parametrize("stop", [[""], ["a", 3], [None]])
def test_a_stop_string_that_could_never_end_a_text_is_refused(stop):
    with pytest.raises(ValueError, match="a stop string must be a text that is not empty"):
        TextStream(KINDS["byte_level"], stop)


class Blocks:
    """Stands where a decode loop stands between two blocks of tokens."""

    def __init__(self, rows, finish):
        self.output = np.array([row + [0] * (8 - len(row)) for row in rows])
        self.num_generated = np.array([len(row) for row in rows])
        self.finish = np.array(finish)


def test_sequences_of_a_batch_end_each_with_its_own_stop_string():
    tokenizer = KINDS["byte_level"]
    texts = TextStreams(tokenizer, "b\n")
    rows = [tokenizer.encode(text) for text in ("aab", "aaa", "ab\na")]
    running, ended = Finish.RUNNING, Finish.LENGTH
    assert texts(Blocks(rows, [running, running, running])).tolist() == [False, False, True]
    assert texts.pieces == ["aa", "aaa", "a"]
    rows = [tokenizer.encode(text) for text in ("aab\na", "aaab", "ab\na")]
    assert texts(Blocks(rows, [running, ended, Finish.STOP])).tolist() == [True, False, False]
    assert texts.pieces == ["", "b", ""]  # the second ended, so nothing can follow its b
    assert texts.texts == ["aa", "aaab", "a"]
    assert texts(Blocks(rows, [Finish.STOP, ended, Finish.STOP])).tolist() == [False] * 3
    assert texts.texts == ["aa", "aaab", "a"]
