"""The options of the commands: every one says what it does and what holds without it."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jaxkv.planner.command import add_arguments as add_plan_arguments
from pallas_kernels.formats import FORMATS

# `dtype` and `quantization` of the cache; no dtype means the model's.
KV_DTYPES = {
    storage.short or name: (None, name) if storage.quantized else (name, None)
    for name, storage in FORMATS.items()
}
_EPILOG = "A character that the output's encoding lacks is written as its number, like \\u2603."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Parses a command line. The name of the command is `command`."""
    top = _Parser(prog="jaxkv", description="A paged KV cache for JAX.", epilog=_EPILOG)
    top.add_argument("--version", action="version", version=_versions(), help="show versions, and exit")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="write text with a model", epilog=_EPILOG))
    _add_profile(commands.add_parser("profile", help="where memory goes while a model writes"))
    text = "four prompts behind one shared system prompt, checked"
    demo = commands.add_parser("demo", help=text, epilog=_EPILOG)
    _add_known_model(demo)
    _add_common(demo)
    text = "does a model fit a device, how many sequences, how long?"
    add_plan_arguments(commands.add_parser("plan", help=text))
    return top


def _versions() -> str:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:  # a source tree on the path
            return "(not installed)"

    return f"jaxkv {of('jaxkv')} (jax {of('jax')}, jaxlib {of('jaxlib')}, Python {platform.python_version()})"


def _add_generate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--model",
        required=True,
        metavar="PATH_OR_NAME",
        help="a GGUF file, a Hugging Face folder, or a known name, like smollm2-135m (required)",
    )
    text = "text to continue; may be repeated (default: those of --prompts-file alone)"
    add("--prompt", action="append", default=[], metavar="TEXT", help=text)
    text = "UTF-8, one prompt a line; blank lines are skipped (default: none)"
    add("--prompts-file", type=Path, metavar="FILE", help=text)
    text = "put each prompt into the model's chat template (default: off)"
    add("--chat", action="store_true", help=text)
    text = "system prompt, with --chat (default: the template's own, if it has one)"
    add("--system", metavar="TEXT", help=text)
    add(
        "--parse-special",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take special tokens that are written out in prompts, like <|im_end|>, as such (default: on "
        "without --chat, off with it)",
    )
    text = "end a text before this string; may be repeated (default: none)"
    add("--stop", action="append", default=[], metavar="TEXT", help=text)
    add("--num-samples", type=_count, default=1, metavar="N", help="continuations a prompt (default: 1)")
    text = "0 is greedy; higher is more random (default: 0)"
    add("--temperature", type=float, default=0.0, metavar="T", help=text)
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: from all)")
    text = "draw from the likeliest tokens that together have this probability (default: from all)"
    add("--top-p", type=float, metavar="P", help=text)
    _add_seed(command)
    _add_num_pages(command)
    add(
        "--policy",
        metavar="NAME:TOKENS[,...]",
        help="bound each sequence's memory: sliding-window:1024,sinks=4 or heavy-hitter:512,recent=256, lru, "
        "semantic-merge, prompt-compress (default: keep everything)",
    )
    text = "serve metrics for Prometheus; 0 is any free port (default: serve none)"
    add("--metrics-port", type=_port, metavar="N", help=text)
    _add_common(command, least=0)


def _add_profile(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_known_model(command)
    text = "text to continue; may be repeated (default: the demo's)"
    add("--prompt", action="append", default=[], metavar="TEXT", help=text)
    add("--num-samples", type=_count, default=3, metavar="N", help="continuations a prompt (default: 3)")
    text = "0 is greedy; higher is more random (default: 0.8)"
    add("--temperature", type=float, default=0.8, metavar="T", help=text)
    _add_seed(command)
    _add_num_pages(command)
    add("--plot", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf (default: text alone)")
    _add_common(command)


def _add_known_model(command: argparse.ArgumentParser) -> None:
    text = "a GGUF file, a Hugging Face folder, or a known name (default: smollm2-135m)"
    command.add_argument("--model", default="smollm2-135m", metavar="PATH_OR_NAME", help=text)


def _add_seed(command: argparse.ArgumentParser) -> None:
    text = "of the random draws; the same seed draws the same (default: 0)"
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help=text)


def _add_num_pages(command: argparse.ArgumentParser) -> None:
    text = "pages in the pool (default: enough for all)"
    command.add_argument("--num-pages", type=_count, metavar="N", help=text)


def _add_common(command: argparse.ArgumentParser, least: int = 1) -> None:
    add = command.add_argument
    number = _count if least else _count_or_none
    text = "most tokens of a continuation (default: 64)"
    add("--max-new-tokens", type=number, default=64, metavar="N", help=text)
    add("--page-size", type=_count, default=16, metavar="N", help="tokens a page (default: 16)")
    add("--kv-dtype", choices=KV_DTYPES, help="how K and V are stored (default: as the model's weights)")
    cache = command.add_mutually_exclusive_group()
    cache.add_argument(
        "--compilation-cache",
        type=_directory,
        metavar="DIR",
        help="keep compiled programs here for the next run (default: JAX_COMPILATION_CACHE_DIR, else "
        "$XDG_CACHE_HOME/jaxkv, else ~/.cache/jaxkv)",
    )
    text = "keep no compiled programs, and use none that were kept (default: off)"
    cache.add_argument("--no-compilation-cache", action="store_true", help=text)


def _count(text: str) -> int:
    value = _integer(text)
    if not 1 <= value < 2**30:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer below {2**30}")
    return value


def _count_or_none(text: str) -> int:
    value = _integer(text)
    if not 0 <= value < 2**30:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to {2**30 - 1}")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return -1


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to {2**32 - 1}")
    return int(text)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to {2**16 - 1}")
    return int(text)


def _directory(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory's name")
    return Path(text)
