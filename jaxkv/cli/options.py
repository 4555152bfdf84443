"""Options that commands share; the help of each states its default."""

import argparse
from pathlib import Path

from pallas_kernels.formats import FORMATS

# `dtype` and `quantization` of the cache; no dtype means the model's.
KV_DTYPES = {
    storage.short or name: (None, name) if storage.quantized else (name, None)
    for name, storage in FORMATS.items()
}
# For commands that print text of a model.
EPILOG = "A character that the output's encoding lacks is written as an escape, like \\u2603."


def add_model(command: argparse.ArgumentParser) -> None:
    """Adds `--model`, which must be given."""
    text = "a GGUF file, a Hugging Face folder, or a known name, like smollm2-135m (required)"
    command.add_argument("--model", required=True, metavar="PATH_OR_NAME", help=text)


def add_known_model(command: argparse.ArgumentParser) -> None:
    """Adds `--model`, with a default."""
    text = "a GGUF file, a Hugging Face folder, or a known name (default: smollm2-135m)"
    command.add_argument("--model", default="smollm2-135m", metavar="PATH_OR_NAME", help=text)


def add_chat(command: argparse.ArgumentParser) -> None:
    """Adds the options of how prompts become tokens."""
    add = command.add_argument
    text = "put each prompt into the model's chat template (default: off)"
    add("--chat", action="store_true", help=text)
    text = "system prompt, with --chat (default: the template's own, if it has one)"
    add("--system", metavar="TEXT", help=text)
    text = "parse special tokens written in prompts, like <|im_end|> (default: only without --chat)"
    add("--parse-special", action=argparse.BooleanOptionalAction, default=None, help=text)


def add_metrics_port(command: argparse.ArgumentParser) -> None:
    """Adds `--metrics-port`."""
    text = "serve metrics for Prometheus; 0 is any free port (default: serve none)"
    command.add_argument("--metrics-port", type=_port, metavar="N", help=text)


def add_seed(command: argparse.ArgumentParser) -> None:
    """Adds `--seed`."""
    text = "seed of the random draws (default: 0)"
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help=text)


def add_num_pages(command: argparse.ArgumentParser) -> None:
    """Adds `--num-pages`."""
    text = "pages in the pool (default: enough for all)"
    command.add_argument("--num-pages", type=count, metavar="N", help=text)


def add_common(
    command: argparse.ArgumentParser, least: int = 1, new_tokens: str = "most tokens of a continuation"
) -> None:
    """Adds the options of every command that runs a model.

    Args:
      command: the command.
      least: smallest `--max-new-tokens`.
      new_tokens: what `--max-new-tokens` is.
    """
    add = command.add_argument
    number = count if least else _count_or_none
    text = f"{new_tokens} (default: 64)"
    add("--max-new-tokens", type=number, default=64, metavar="N", help=text)
    add("--page-size", type=count, default=16, metavar="N", help="tokens per page (default: 16)")
    add("--kv-dtype", choices=KV_DTYPES, help="how K and V are stored (default: as the model's weights)")
    cache = command.add_mutually_exclusive_group()
    cache.add_argument(
        "--compilation-cache",
        type=_directory,
        metavar="DIR",
        help="keep compiled programs here for the next run (default: JAX_COMPILATION_CACHE_DIR, else "
        "$XDG_CACHE_HOME/jaxkv, else ~/.cache/jaxkv)",
    )
    text = "neither keep compiled programs nor use kept ones (default: off)"
    cache.add_argument("--no-compilation-cache", action="store_true", help=text)


def count(text: str) -> int:
    """A positive integer."""
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
    """A port, or 0."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to {2**16 - 1}")
    return int(text)


def _directory(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory's name")
    return Path(text)
