"""Tokenizers from GGUF metadata and from Hugging Face files; chat templates; streamed text."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.errors import ModelLoadError
from jaxkv.models import Tokenizer, TokenizerError
from jaxkv.models.tokenizer_gguf import gguf_tokenizer
from tests.models import gguf_files

CORPUS = [
    "The quick brown fox's 12345 jumps, didn't they? I'll see 42 of 'em.\n\n\tIndented  twice.",
    "Größe, naïve café, 日本語のテキスト, русский текст, 🎉🎉 and 👩‍👩‍👧.",
    "def f(x):\r\n    return x**2 + 3.14  # π ½ Ⅷ\n",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trained(pre_tokenizer):
    """A byte-level BPE tokenizer as Hugging Face files describe one."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def as_gguf(path: Path, inner: tokenizers.Tokenizer, pre: str, **more) -> Tokenizer:
    """The same tokenizer by way of GGUF metadata."""
    raw = json.loads(inner.to_str())["model"]
    tokens = sorted(raw["vocab"], key=raw["vocab"].get)
    fields = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in raw["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
    } | more
    return gguf_tokenizer(GGUFFile(gguf_files.write(path, fields, {})))


def byte_level():
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])
    inner = trained(split)
    return inner, as_gguf(tmp_path_factory.mktemp("smollm") / "t.gguf", inner, "smollm")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    inner = trained(byte_level())
    return inner, as_gguf(tmp_path_factory.mktemp("gpt2") / "t.gguf", inner, "gpt-2")


@pytest.mark.parametrize("name", ["smollm", "gpt2"])
@given(text=st.one_of(st.sampled_from(CORPUS), st.text(max_size=40)))
@settings(max_examples=150, deadline=None)
def test_gguf_splits_text_as_hugging_face_does(request, name, text):
    original, ours = request.getfixturevalue(name)
    assert ours.encode(text) == original.encode(text).ids
    assert ours.decode(ours.encode(text), skip_special=False) == text


@given(text=st.text(max_size=40), cuts=st.lists(st.integers(1, 7), max_size=60))
@settings(max_examples=150, deadline=None)
def test_streamed_blocks_add_up_to_the_text(smollm, text, cuts):
    tokenizer = smollm[1]
    ids, stream, pieces = tokenizer.encode(text), tokenizer.stream(), []
    for cut in [*cuts, len(ids)]:
        pieces.append(stream.push(ids[:cut]))
        ids = ids[cut:]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(tokenizer.encode(text))
    assert stream.flush() == ""


def test_half_a_character_waits_for_its_end(smollm):
    tokenizer = smollm[1]
    stream = tokenizer.stream()
    shown = [stream.push([token]) for token in tokenizer.encode("a☃b")]
    assert shown == ["a", "", "", "☃", "b"]
    assert stream.push(tokenizer.encode("☃")[:2]) == "" and stream.flush() == "\ufffd"


def test_llama3_and_qwen2_cut_numbers_their_way(tmp_path, gpt2):
    def digits(pre):
        tokenizer = as_gguf(tmp_path / f"{pre}.gguf", gpt2[0], pre)
        cut = tokenizer.inner.pre_tokenizer.pre_tokenize_str("year 20245 IT'S\n\n x")
        return [text for text, _ in cut]

    start = ["year", "Ġ"]
    end = ["ĠIT", "'S", "ĊĊ", "Ġx"]
    assert digits("llama-bpe") == [*start, "202", "45", *end]
    assert digits("qwen2") == [*start, *"20245", *end]


def test_llama3_starts_with_its_first_token_unless_told_not_to(tmp_path, gpt2):
    tokenizer = as_gguf(tmp_path / "a.gguf", gpt2[0], "llama-bpe")
    assert tokenizer.encode("a")[0] == 1 and tokenizer.encode("a", add_special=False)[0] != 1
    without = as_gguf(tmp_path / "b.gguf", gpt2[0], "llama-bpe", **{"tokenizer.ggml.add_bos_token": False})
    assert without.encode("a")[0] != 1


def test_special_tokens_are_one_id_and_hidden_in_text(smollm):
    tokenizer = smollm[1]
    ids = tokenizer.encode("<|im_start|>user")
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "user"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>user"
    assert tokenizer.stop_tokens == {0, 2}
    assert tokenizer.vocab_size == 400


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {{ 1 + 1 }}"}]


def test_chat_renders_the_template_and_only_it(smollm):
    tokenizer = smollm[1]
    text = tokenizer.chat(MESSAGES)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ 1 + 1 }}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.encode_chat(MESSAGES) == tokenizer.encode(text)
    assert not tokenizer.chat(MESSAGES, add_generation_prompt=False).endswith("assistant\n")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, MESSAGES, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", MESSAGES, "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", MESSAGES, "the chat template refused"),
        ("{% for", MESSAGES, "the chat template refused"),
        ("{{ messages[0] + 1 }}", MESSAGES, "the chat template refused"),
        ("", [{"role": "user"}], "message 0 needs a text 'content'"),
        ("", [{"role": 3, "content": ""}], "message 0 needs a text 'role'"),
        ("", ["hello"], "message 0 must be a role and its content"),
    ],
)
def test_a_template_or_message_that_does_not_work_is_named(smollm, template, messages, message):
    with pytest.raises(TokenizerError) as raised:
        Tokenizer(smollm[0], chat_template=template).chat(messages)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_bad_text_and_ids_are_refused(smollm):
    tokenizer = smollm[1]
    with pytest.raises(TokenizerError, match="not valid UTF-8 at character 2"):
        tokenizer.encode("ab\udc80")
    with pytest.raises(TokenizerError, match="token id -1 is out of range"):
        tokenizer.decode([-1])


@pytest.fixture
def hf_folder(tmp_path, smollm):
    smollm[0].save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    return tmp_path


def test_hugging_face_files_give_the_same_tokenizer(hf_folder, smollm):
    ours = Tokenizer.from_hf(hf_folder)
    assert ours.stop_tokens == {0, 2, 5}
    assert ours.encode_chat(MESSAGES) == smollm[1].encode_chat(MESSAGES)
    (hf_folder / "chat_template.jinja").write_text("{{ eos_token }}")
    assert Tokenizer.from_hf(hf_folder).chat([]) == "<|im_end|>"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json: is not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: is not a tokenizer"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: is not JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: must hold a JSON object"),
        ("generation_config.json", b"\xff", "generation_config.json: is not JSON"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: is not UTF-8 text"),
    ],
)
def test_a_bad_hugging_face_file_is_named(hf_folder, file, content, message):
    (hf_folder / file).write_bytes(content)
    with pytest.raises(ModelLoadError) as raised:
        Tokenizer.from_hf(hf_folder)
    assert message in str(raised.value) and "\n" not in str(raised.value)
