"""The README's examples run as a reader pastes them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_there_are_two_examples_and_at_most_120_lines():
    assert len(EXAMPLES) == 2
    assert len(README.splitlines()) <= 120


def test_the_text_example_prints_two_answers_to_each_question(tmp_path):
    lines = pasted(EXAMPLES[0], tmp_path)
    assert [lines.index(question) for question in ("Why is the sky blue?", "What is the capital of France?")]
    assert "Paris" in "\n".join(lines[lines.index("What is the capital of France?") :])


@pytest.mark.parametrize("example", EXAMPLES[1:])
def test_the_decode_loop_prints_a_token_for_each_sequence(example, tmp_path):
    (line,) = pasted(example, tmp_path)
    tokens, free = re.fullmatch(r"\[ *(\d+ +\d+)\] free pages: (\d+)", line).groups()
    assert len(tokens.split()) == 2
    assert int(free) == 64 - 2 * 2  # 23 and 22 tokens take two pages of 16 each
