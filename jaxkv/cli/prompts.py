"""The user's prompts, from options and files, and those of the demo."""

import argparse
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxkv.models import Tokenizer  # which needs an extra

SYSTEM_PROMPT = (
    "You are a helpful AI assistant who answers questions about geography, science and daily life. Your "
    "users are curious people who want short, correct and friendly answers. Answer each question in one or "
    "two complete sentences, in plain English."
)
QUESTIONS = (
    "What is the capital of France?",
    "What is the largest planet in our solar system?",
    "What is photosynthesis?",
    "Give me a tip for learning to cook.",
)


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of `jaxkv generate`, from its options and its file.

    Raises:
      ValueError: naming the option or the prompt that is wrong.
    """
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        try:
            text = options.prompts_file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{options.prompts_file}: is not UTF-8 at byte {error.start}") from None
        except ValueError as error:
            raise ValueError(f"--prompts-file {str(options.prompts_file)!r}: {error}") from None
        # Not `splitlines`, whose other separators may be part of a prompt. A byte order mark is not.
        prompts += [line for line in re.split("\r\n|\n|\r", text.removeprefix("\ufeff")) if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompts-file FILE with at least one line")
    if not options.model:
        raise ValueError("--model is empty")
    check_prompts(prompts)
    if options.system is not None and not options.chat:
        raise ValueError("--system needs --chat")
    return prompts


def check_prompts(prompts: list[str]) -> None:
    """Raises `ValueError` for a prompt that is empty or not UTF-8, with its number."""
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty")
        if not _is_utf8(prompt):
            raise ValueError(f"prompt {number} is not UTF-8")


def check_stop(stop: list[str]) -> None:
    """Raises `ValueError` for a stop string that is empty or not UTF-8."""
    for text in stop:
        if not text:
            raise ValueError("--stop is empty")
        if not _is_utf8(text):
            raise ValueError(f"--stop {text!r} is not UTF-8")


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def token_ids(tokenizer: "Tokenizer", prompts: list[str], options: argparse.Namespace) -> list[list[int]]:
    """Token ids of each prompt. With --chat, text of special tokens is not parsed, unless the user asks."""
    parse = not options.chat if options.parse_special is None else options.parse_special
    if not options.chat:
        return [tokenizer.encode(prompt, parse_special=parse) for prompt in prompts]
    system = [{"role": "system", "content": options.system}] if options.system else []
    chats = ([*system, {"role": "user", "content": prompt}] for prompt in prompts)
    return [tokenizer.encode_chat(chat, parse_special=parse) for chat in chats]


def demo_prompts(tokenizer: "Tokenizer") -> list[list[int]]:
    """Token ids of the demo's questions, each after the system prompt."""
    system = {"role": "system", "content": SYSTEM_PROMPT}
    return [tokenizer.encode_chat([system, {"role": "user", "content": question}]) for question in QUESTIONS]
