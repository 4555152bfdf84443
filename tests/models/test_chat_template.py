"""Chat templates are rendered as `transformers` renders them; malformed ones are named."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models import ModelLoadError, Tokenizer, TokenizerError
from jaxkv.models.tokenizer_gguf import gguf_tokenizer
from tests.models import gguf_files
from tests.models.text_tokenizers import KINDS

# Made by the script beside it.
CASES = json.loads(Path("tests/fixtures/chat_templates.json").read_text(encoding="utf-8"))["cases"]
USER = {"role": "user", "content": "Hi"}


def tokenizer(template, special=()) -> Tokenizer:
    special = dict(special)
    named = {name: special.pop(f"{name}_token", "") for name in ("bos", "eos")}
    return Tokenizer(KINDS["byte_level"].inner, chat_template=template, special=special, **named)


@pytest.mark.parametrize("name", CASES)
def test_a_template_gives_the_text_that_transformers_gives(name):
    case = CASES[name]
    options = {"add_generation_prompt": False} | case["options"]
    ours = tokenizer(case["template"], case["special"])
    assert ours.chat(case["messages"], **options) == case["expected"]


def test_strftime_now_is_the_local_time():
    before, text, after = (
        datetime.now(),
        tokenizer("{{ strftime_now('%Y-%m-%d %H:%M') }}").chat([USER]),
        datetime.now(),
    )
    assert before.strftime("%Y-%m-%d %H:%M") <= text <= after.strftime("%Y-%m-%d %H:%M")


def test_what_a_template_sets_in_one_chat_is_not_seen_in_the_next():
    ours = tokenizer("{{ seen is defined }}{% set seen = 1 %}{% generation %}{{ seen }}{% endgeneration %}")
    assert ours.chat([USER]) == ours.chat([USER]) == "False1"


def test_a_message_keeps_what_is_none_as_transformers_does():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    ours = tokenizer(
        "{{ messages[0].content is none }} {{ messages[0].name is none }} {{ messages[0].x is defined }}"
    )
    assert ours.chat([call]) == "True True False"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": None}], "message 0 needs a text 'content', or a list of parts"),
        ([{"role": "user", "content": 3}], "message 0 needs a text 'content', or a list of parts"),
        ([USER, {"role": "user", "content": ["a"]}], "message 1: each part of 'content' must be a mapping"),
        ([{"role": None, "content": "a"}], "message 0 needs a text 'role'"),
        ([{"role": "user", "content": "", "image": object()}], "message 0 holds a object"),
    ],
)
def test_a_malformed_message_is_named(messages, message):
    with pytest.raises(TokenizerError) as raised:
        tokenizer("{{ messages }}").chat(messages)
    assert message in str(raised.value)


def test_a_template_does_not_reach_python():
    for template in ("{{ strftime_now.__globals__['json'] }}", "{{ messages[0].update(role='x') }}"):
        with pytest.raises(TokenizerError, match="the chat template refused the messages"):
            tokenizer(template).chat([USER])


def hf_folder(path: Path, settings) -> Path:
    KINDS["byte_level"].inner.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


NAMED = [
    {"name": "default", "template": "plain"},
    {"name": "tool_use", "template": "{{ tools | length }} tools"},
]


def test_the_template_for_tools_is_taken_where_there_are_tools(tmp_path):
    ours = Tokenizer.from_hf(hf_folder(tmp_path, {"chat_template": NAMED}))
    assert (ours.chat([USER]), ours.chat([USER], tools=[{}])) == ("plain", "1 tools")
    assert tokenizer("{{ tools | length }}").chat([USER], tools=[{}]) == "1"
    alone = Tokenizer.from_hf(hf_folder(tmp_path, {"chat_template": NAMED[1:]}))
    with pytest.raises(TokenizerError, match="no chat template; it has templates named tool_use"):
        alone.chat([USER])


def test_files_of_templates_hold_instead_of_the_settings(tmp_path):
    folder = hf_folder(tmp_path, {"chat_template": NAMED})
    (folder / "chat_template.jinja").write_text("a file")
    assert Tokenizer.from_hf(folder).chat([USER], tools=[{}]) == "a file"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools in a file")
    assert Tokenizer.from_hf(folder).chat([USER], tools=[{}]) == "tools in a file"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([{"name": "default"}], "chat_template[0] must have a text 'name' and a text 'template'"),
        ([*NAMED, {"template": "a"}], "chat_template[2] must have a text 'name' and a text 'template'"),
        (["default"], "chat_template[0] must have a text 'name' and a text 'template'"),
        ([{"name": "default", "template": 3}], "chat_template[0] must have"),
        (5, "chat_template must be a text or a list of named templates, not 5"),
    ],
)
def test_malformed_named_templates_are_an_error_that_names_them(tmp_path, template, message):
    with pytest.raises(ModelLoadError) as raised:
        Tokenizer.from_hf(hf_folder(tmp_path, {"chat_template": template}))
    assert isinstance(raised.value, ValueError)
    assert f"tokenizer_config.json: {message}" in str(raised.value)


NAMES = "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token is defined }}"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
def test_templates_may_name_the_special_tokens_of_a_folder(tmp_path, where):
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": "<pad>"}
    folder = hf_folder(tmp_path, {"chat_template": NAMES})
    if where == "tokenizer_config.json":
        names["chat_template"] = NAMES
    (folder / where).write_text(json.dumps(names))
    assert Tokenizer.from_hf(folder).chat([USER]) == "<s></s><unk><pad>False"


def test_templates_may_name_the_special_tokens_of_a_gguf_file(tmp_path):
    fields = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "<unk>", "<pad>", "a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.chat_template": NAMES,
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "{{ tools | length }}",
    }
    ours = gguf_tokenizer(GGUFFile(gguf_files.write(tmp_path / "a.gguf", fields, {})))
    assert ours.chat([USER]) == "<s></s><unk><pad>False"
    assert ours.chat([USER], tools=[{}, {}]) == "2"
