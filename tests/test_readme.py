"""The README's examples run as a reader pastes them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.models import ModelConfig, random_model
from jaxkv.models.loading import LoadedModel, find_model
from jaxkv.models.tokenizer_gguf import gguf_tokenizer

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def pasted(example: str, folder: Path) -> list[str]:
    """Runs a file that holds no more than the example, as a user's own process does."""
    path = folder / "pasted.py"
    path.write_text(example, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, path], env=dict(os.environ), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_there_are_three_examples_and_at_most_120_lines():
    assert len(EXAMPLES) == 3
    assert len(EXAMPLES[2].splitlines()) <= 15
    assert len(README.splitlines()) <= 120


@pytest.fixture
def tiny(monkeypatch):
    """SmolLM2's tokenizer, and a random model of one layer in its place; the names that were loaded."""
    tokenizer = gguf_tokenizer(GGUFFile(find_model("smollm2-135m")))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_layers=1,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=16,
        max_context=128,
    )
    loaded = LoadedModel(random_model(config, jax.random.key(0)), config, tokenizer, "tiny")
    asked = []
    monkeypatch.setattr("jaxkv.models.load", lambda name: asked.append(name) or loaded)
    yield asked
    assert asked == ["smollm2-135m"]


def test_the_text_example_prints_two_answers_to_each_question(tiny, capsys):
    variables = {}
    exec(compile(EXAMPLES[0], "README.md", "exec"), variables)
    out = capsys.readouterr().out
    assert out.count("Why is the sky blue?\n") == out.count("What is the capital of France?\n") == 1
    tokens = variables["result"].tokens
    assert [[len(sample) for sample in samples] for samples in tokens] == [[32, 32], [32, 32]]


def test_the_server_streams_both_answers(tiny, capsys):
    exec(compile(EXAMPLES[2], "README.md", "exec"), {})
    events = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in events} == {"0", "1"}
    assert sum(line.endswith((" LENGTH", " STOP")) for line in events) == 2


@pytest.mark.slow
def test_the_text_example_knows_the_capital_of_france(tmp_path):
    lines = pasted(EXAMPLES[0], tmp_path)
    assert [lines.index(question) for question in ("Why is the sky blue?", "What is the capital of France?")]
    assert "Paris" in "\n".join(lines[lines.index("What is the capital of France?") :])


def test_the_decode_loop_prints_a_token_for_each_sequence(tmp_path):
    (line,) = pasted(EXAMPLES[1], tmp_path)
    tokens, free = re.fullmatch(r"\[ *(\d+ +\d+)\] free pages: (\d+)", line).groups()
    assert len(tokens.split()) == 2
    assert int(free) == 64 - 2 * 2  # 23 and 22 tokens take two pages of 16 each
