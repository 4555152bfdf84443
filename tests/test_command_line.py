"""What the command says of itself, what it reads, and what it writes."""

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path

import jax
import pytest
import tokenizers
import tokenizers.models
from rich.console import Console

import jaxkv
from jaxkv.cli import main
from jaxkv.cli.command_line import parser
from jaxkv.cli.progress import Status
from jaxkv.cli.prompts import read_prompts, token_ids
from jaxkv.memory.device import DeviceMemory
from jaxkv.memory.profile import memory_profile
from jaxkv.models import Tokenizer
from tests import command_models
from tests.command_models import PROMPT

COMMANDS = ("generate", "serve", "profile", "demo", "plan")


def subparser(name: str) -> argparse.ArgumentParser:
    choices = next(a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(choices) == set(COMMANDS)
    return choices[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does_and_what_holds_without_it(command):
    for action in subparser(command)._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        text, name = action.help or "", action.option_strings or action.dest
        said = re.search(r"\((?:default: (.+)|required.*)\)", text, re.DOTALL)
        assert said and text.index(said[0]) > 5, f"{command} {name}: {text!r}"
        if isinstance(action.default, int | float | str) and not isinstance(action.default, bool):
            assert said[1].startswith(str(action.default).removesuffix(".0"))


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_is_shown_and_is_no_error(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert "usage: jaxkv" in capsys.readouterr().out


def test_the_version_names_those_of_jax_too(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"jaxkv \S+.* \(jax \d\S+, jaxlib \d\S+, Python 3\.\d+\.\S+\)\n", out)
    assert f"jax {jax.__version__}," in out


def prompts_of(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return read_prompts(parser().parse_args(["generate", "--model", "x", "--prompts-file", str(path)]))


def test_a_prompts_file_has_a_prompt_a_line_however_its_lines_end(tmp_path):
    content = b"one\ntwo\r\nthree\rfour\n\n \nfive"
    assert prompts_of(tmp_path / "a", content) == ["one", "two", "three", "four", "five"]


def test_other_separators_are_part_of_a_prompt(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
    assert prompts_of(tmp_path / "a", f"{text}\nj".encode()) == [text, "j"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    assert prompts_of(tmp_path / "a", b"\xef\xbb\xbfone\ntwo") == ["one", "two"]
    assert prompts_of(tmp_path / "a", "one\n\ufefftwo".encode()) == ["one", "\ufefftwo"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return command_models.tiny(tmp_path_factory.mktemp("models"))


def generated(capsys, model: str, *options: str) -> str:
    assert main(["generate", "--model", model, *PROMPT, *options]) == 0
    return capsys.readouterr().out


def test_a_stop_string_ends_the_printed_text_before_it(capsys, tiny_model):
    whole = generated(capsys, tiny_model)
    words = whole.split()
    assert len(words) == 24
    first = words.index(words[9])
    stop = f"{words[first]} {words[first + 1][:2]}"  # over two tokens, and inside the second
    expected = whole[: whole.index(stop)]
    assert generated(capsys, tiny_model, "--stop", stop, "--stop", "never") == f"{expected}\n"
    # The same for several texts, which are printed at the end.
    out = generated(capsys, tiny_model, "--stop", stop, "--num-samples", "2")
    assert out.split("\n> ŵ1 ŵ2 ŵ3\n")[1:] == [f"{expected.strip()}\n"] * 2


def test_no_new_tokens_are_an_empty_text(capsys, tiny_model):
    assert main(["generate", "--model", tiny_model, *PROMPT, "--max-new-tokens", "0"]) == 0
    out, error = capsys.readouterr()
    assert out == "\n" and "decode 0 tokens" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stop", ""], "--stop is empty"),
        (["--stop", "a", "--stop", "\udcff"], "--stop '\\udcff' is not UTF-8"),
        (["--max-new-tokens", "-1"], "'-1' is not an integer from 0"),
        (["--compilation-cache", ""], "'' is not a directory's name"),
        (["--compilation-cache", "a", "--no-compilation-cache"], "not allowed with argument"),
    ],
)
def test_a_bad_option_is_one_line(capsys, options, message):
    with contextlib.suppress(SystemExit):
        assert main(["generate", "--model", "x", "--prompt", "a", *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize("handler", ["strict", "surrogateescape", "replace"])
def test_characters_that_the_output_lacks_are_written_as_numbers(monkeypatch, capsys, tiny_model, handler):
    whole = generated(capsys, tiny_model)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=handler)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["generate", "--model", tiny_model, *PROMPT, "--num-samples", "1"]) == 0
    out.flush()
    expected = whole.replace("ŵ", "?" if handler == "replace" else "\\u0175")
    assert out.buffer.getvalue().decode() == expected


def test_a_prompt_in_a_conversation_does_not_end_its_turn_unless_told_to():
    letters = {letter: number for number, letter in enumerate("<|end>a", 1)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"<|end|>": 0} | letters, []))
    inner.add_special_tokens(["<|end|>"])
    tokenizer = Tokenizer(inner, chat_template="{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")

    def ends(*options: str) -> int:
        arguments = ["generate", "--model", "x", "--prompt", "a<|end|>a", *options]
        return token_ids(tokenizer, ["a<|end|>a"], parser().parse_args(arguments))[0].count(0)

    assert (ends("--chat"), ends("--chat", "--parse-special")) == (1, 2)
    assert (ends(), ends("--no-parse-special")) == (1, 0)
    assert ends("--chat", "--system", "<|end|>") == 2


def test_a_terminal_sees_for_how_long_something_is_under_way():
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with Status("compiling", console) as status:
        status._progress.refresh()
        status.next("decoding")
        status._progress.refresh()
    shown = console.file.getvalue()
    assert re.search(r"compiling.*0:00:00", shown) and re.search(r"decoding.*0:00:00", shown)


def test_elsewhere_one_line_says_how_long_compiling_took(capsys, tiny_model):
    main(["generate", "--model", tiny_model, *PROMPT])
    lines = capsys.readouterr().err.split("\n")
    assert re.fullmatch(r"compiled and ran the prompts in \d+\.\d s", lines[0])
    assert [line.split()[0] for line in lines[1:] if line] == ["prefill", "2"]  # and nothing else


def units(text: str) -> set[str]:
    return set(re.findall(r"\d (B|KiB|MiB|GiB|TiB)\b", text))


@pytest.mark.parametrize(
    "command",
    [
        "llama-3.1-8b --device H100 --concurrency 4",
        "llama-3.1-70b --device H100 --context 128",
        "--compare llama-2-7b smollm2-135m --memory 24GB --context 8",
        "smollm2-135m --context 4 --kv-dtype int8 --page-size auto",
    ],
)
def test_each_table_of_a_plan_has_one_unit(capsys, command):
    main(["plan", *command.split()])
    plan, _, page_sizes = capsys.readouterr().out.partition("\npage size ")
    assert units(plan) == {"MiB"}
    assert units(page_sizes) == ({"KiB"} if "auto" in command else set())


def test_a_profile_has_one_unit():
    sizes = dict(num_layers=1, num_kv_heads=1, head_dim=8, page_size=4)
    for pages, unit in ((8, "KiB"), (8192, "MiB")):
        cache = jaxkv.init(jaxkv.CacheConfig(num_pages=pages, **sizes))
        assert units(memory_profile(cache).report()) == {unit}
    report = DeviceMemory(3 * 2**30, 2**30, 5 * 2**20, 17, 80 * 2**30, "memory_stats").report()
    assert units(report) == {"GiB"} and "0.0049 GiB" in report and "1.00 GiB" in report
