"""A model for tests of the command: random, a few kilobytes, in a folder."""

import json
import shutil
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
