"""The commands: what they print, and that a user's mistake is one line and exit code 2."""

import json
import re
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request

import pytest
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers

from jaxkv.cli import main
from tests.command_models import run


def fails(capsys, *arguments: str) -> str:
    """Runs a command that must fail, and returns its one line."""
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    out, error = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1, error
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["frob"], "frob"),
        (["generate"], "--model"),
        (["generate", "--model", "x", "--num-samples", "0"], "'0' is not a positive integer"),
        (["generate", "--model", "x", "--page-size", "many"], "'many' is not a positive integer"),
        (["generate", "--model", "x", "--kv-dtype", "int3"], "int3"),
        (["generate", "--model", "x", "--frob"], "--frob"),
        (["generate", "--model", "x", "--seed", "-1"], "'-1' is not an integer from 0"),
        (["generate", "--model", "x", "--max-new-tokens", "3000000000"], "'3000000000' is not"),
        (["generate", "--model", "", "--prompt", "a"], "--model is empty"),
        (["generate", "--model", "x", "--prompts-file", "a\0b"], "--prompts-file 'a"),
        (["generate", "--model", "x"], "no prompt"),
        (["generate", "--model", "x", "--prompt", " "], "prompt 0 is empty"),
        (["generate", "--model", "x", "--prompt", "a", "--prompt", "\udcff"], "prompt 1 is not UTF-8"),
        (["generate", "--model", "x", "--prompt", "a", "--system", "b"], "--system needs --chat"),
        (["generate", "--model", "x", "--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "--model", "x", "--prompt", "a", "--top-p", "nan"], "top_p=nan"),
        (["generate", "--model", "x", "--prompt", "a", "--top-k", "0"], "top_k=0"),
        (["generate", "--model", "nowhere", "--prompt", "a"], "nowhere: no such file or folder"),
        (["generate", "--model", "pyproject.toml", "--prompt", "a"], "pyproject.toml: is not a GGUF file"),
        (["generate", "--model", "tests", "--prompt", "a"], "config.json"),
        (["generate", "--model", "x", "--prompts-file", "nowhere.txt"], "nowhere.txt"),
        (["generate", "--model", "x", "--metrics-port", "65536"], "'65536' is not a port, 0 to 65535"),
        (["generate", "--model", "x", "--metrics-port", "-1"], "'-1' is not a port"),
        (["generate", "--model", "x", "--metrics-port", "http"], "'http' is not a port"),
        (["serve", "--model", "x"], "--requests"),
        (["serve", "--model", "", "--requests", "-"], "--model is empty"),
        (["serve", "--model", "x", "--requests", "nowhere.jsonl"], "nowhere.jsonl"),
        (["serve", "--model", "x", "--requests", "tests"], "tests: is a directory"),
        (["serve", "--model", "x", "--requests", "a\0b"], "--requests 'a"),
        (["serve", "--model", "x", "--requests", "-", "--system", "b"], "--system needs --chat"),
        (["serve", "--model", "x", "--requests", "-", "--speculate", "3"], "'3' is not NGRAM:TOKENS"),
        (["serve", "--model", "x", "--requests", "-", "--speculate", "0:4"], "'0:4' is not NGRAM:TOKENS"),
        (["serve", "--model", "x", "--requests", "-", "--slots", "0"], "'0' is not a positive integer"),
        (["profile", "--prompt", " "], "prompt 0 is empty"),
        (["profile", "--model", "nowhere"], "nowhere: no such file or folder"),
        (["profile", "--num-samples", "0"], "'0' is not a positive integer"),
        (["profile", "--plot", "out.xyz"], "--plot out.xyz: the name must end with one of"),
        (["profile", "--plot", "nowhere/out.png"], "no such folder nowhere"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


def test_a_prompts_file_that_is_not_utf8_is_named_with_its_byte(capsys, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"good\nbad \xff\n")
    line = fails(capsys, "generate", "--model", "x", "--prompts-file", str(path))
    assert "prompts.txt: is not UTF-8 at byte 9" in line


def test_a_prompts_file_of_blank_lines_holds_no_prompt(capsys, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n  \n")
    assert "no prompt" in fails(capsys, "generate", "--model", "x", "--prompts-file", str(path))


def test_a_port_in_use_is_refused_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = fails(capsys, "generate", "--model", "x", "--prompt", "a", "--metrics-port", port)
    assert f"metrics cannot be served at 127.0.0.1:{port}: Address already in use" in line


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("matplotlib", ["profile", "--plot", "out.png"]),
        ("prometheus_client", ["generate", "--model", "x", "--prompt", "a", "--metrics-port", "0"]),
    ],
)
def test_a_missing_package_is_named_with_what_brings_it(capsys, monkeypatch, package, arguments):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    extra = {"matplotlib": "plot", "prometheus_client": "metrics"}[package]
    line = fails(capsys, *arguments)
    assert package in line and f"pip install 'jaxkv[{extra}]'" in line


def demo(*options: str) -> tuple[dict[str, str], dict[str, str]]:
    """Runs the demo; its answers by question, and its figures by name."""
    process = run("demo", *options)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    answers = dict(part.split("\n", 1) for part in out.split("> ")[1:])
    figures = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    return answers, figures


def test_the_demo_knows_the_capital_of_france_and_agrees_with_dense_attention():
    answers, figures = demo()
    assert "Paris" in answers["What is the capital of France?"]
    assert "Jupiter" in answers["What is the largest planet in our solar system?"]
    assert float(figures["largest |Δlogit| against dense attention"]) < 1e-3
    assert "xla on cpu" in figures["attention backend"]
    assert "without sharing" in figures["pages"]


@pytest.mark.slow
@pytest.mark.parametrize(("kv_dtype", "saved"), [("int8", "73%"), ("fp8", "73%"), ("int4", "85%")])
def test_the_demo_is_sensible_on_a_quantized_cache(kv_dtype, saved):
    answers, figures = demo("--kv-dtype", kv_dtype)
    assert "Paris" in answers["What is the capital of France?"]
    assert re.search("plants.* light energy", answers["What is photosynthesis?"])
    # From a float32 cache SmolLM2 gives Jupiter 47% and Neptune 41%: too close a call for four bits.
    planet = answers["What is the largest planet in our solar system?"]
    assert ("Jupiter" in planet) or (kv_dtype == "int4" and "Neptune" in planet)
    assert kv_dtype in figures["model"]
    assert f"{saved} saved" in figures["memory"]


@pytest.fixture
def tiny_model(tmp_path) -> str:
    """A random model of a few kilobytes whose tokens are words, for texts without end."""
    folder = shutil.copytree("tests/fixtures/llama_untied", tmp_path / "tiny")
    sizes = json.loads((folder / "config.json").read_text())
    endless = {"max_position_embeddings": 2**20, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(sizes | endless))
    words = {f"w{number}": number for number in range(sizes["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_a_prompt_longer_than_the_cache_is_refused_with_the_numbers(capsys, tiny_model):
    arguments = ["generate", "--model", tiny_model, "--prompt", "w1 w2 w3 w4 w5 w6 w7"]
    line = fails(capsys, *arguments, "--num-pages", "1", "--page-size", "4")
    assert "prompt 0 has 7 tokens; a sequence holds 4" in line


def test_a_pool_that_no_memory_holds_is_refused(capsys, tiny_model):
    arguments = ["generate", "--model", tiny_model, "--prompt", "w1", "--page-size", "1000000"]
    assert "device refused" in fails(capsys, *arguments, "--num-pages", "1000")


def test_generate_streams_text_and_ctrl_c_stops_it_cleanly(tiny_model):
    process = run("generate", "--model", tiny_model, "--prompt", "w1 w2 w3", "--max-new-tokens", "10000000")
    assert process.stdout is not None
    begun = process.stdout.read(3)
    assert begun.strip()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "stopped" in error
    assert out


def test_generate_serves_metrics_while_it_runs(capsys, tiny_model):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    seen, done = [], threading.Event()

    def scrape():
        while not done.wait(0.002):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
                    found = re.search(rb"^jaxkv_pages_used.* (\S+)$", response.read(), re.MULTILINE)
            except OSError:
                continue
            seen.extend([float(found[1])] if found else [])

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        prompts = ["--prompt", "w1 w2 w3", "--prompt", "w4", "--page-size", "1", "--max-new-tokens", "120"]
        code = main(["generate", "--model", tiny_model, *prompts, "--metrics-port", port])
    finally:
        done.set()
        scraper.join()
    assert code == 0
    assert f"metrics: http://127.0.0.1:{port}/metrics" in capsys.readouterr().err
    assert len(set(seen)) > 1
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)


def test_profile_shows_a_report_and_maps_and_draws_them(capsys, tiny_model, tmp_path):
    picture = tmp_path / "out.png"
    arguments = ["--plot", str(picture), "--max-new-tokens", "24", "--page-size", "4", "--num-samples", "2"]
    assert main(["profile", "--model", tiny_model, "--prompt", "w1 w2 w3", *arguments]) == 0
    out = capsys.readouterr().out
    for expected in ("fragmentation", "device memory", "pages before compaction", "waste by page size"):
        assert expected in out
    assert max(map(len, out.splitlines())) <= 80
    assert picture.read_bytes().startswith(b"\x89PNG")
