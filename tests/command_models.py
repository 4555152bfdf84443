"""For tests of the command: a random model of a few kilobytes in a folder, and a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers

PROMPT = ("--prompt", "ŵ1 ŵ2 ŵ3", "--max-new-tokens", "24")


def tiny(path: Path) -> str:
    """Its tokens are words that ASCII cannot write."""
    folder = shutil.copytree("tests/fixtures/llama_untied", path / "tiny")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = {f"ŵ{number}": number for number in range(size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="ŵ0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """A command in a process of its own, which keeps no programs unless the environment says where."""
    # A shell's background job ignores Ctrl-C, and whatever it starts does.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    return subprocess.Popen(
        [sys.executable, "-c", f"{start}; from jaxkv.cli import entry_point; entry_point()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"} | (env or {}),
    )
