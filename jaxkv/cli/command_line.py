"""The command line: `jaxkv generate`, `jaxkv profile`, `jaxkv demo` and `jaxkv plan`.

A user's mistake is one line on standard error and exit code 2; Ctrl-C is exit code 130.
"""

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence

import jax

from jaxkv.cli.compilation_cache import keep_programs
from jaxkv.cli.options import parser
from jaxkv.cli.plan import run as run_plan
from jaxkv.errors import JaxKVError
from jaxkv.extras import missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    _lose_no_text()
    options = parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except BrokenPipeError:
        # Whoever read has seen enough, as `head` does. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, JaxKVError, OSError) as error:
        print(f"jaxkv: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"jaxkv: error: {missing(error)}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        print(f"jaxkv: error: the device refused: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\njaxkv: stopped", file=sys.stderr)
        return 130


def _lose_no_text() -> None:
    """Characters that an encoding lacks are written as numbers: else the first would end the output."""
    for stream in (sys.stdout, sys.stderr):
        # Other ways to handle them are the user's, as by PYTHONIOENCODING.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _run_generate(options: argparse.Namespace) -> int:
    prompts = _read_prompts(options)
    _check_stop(options.stop)
    _keep_programs(options)
    from jaxkv.cli.generate import run_generate

    return run_generate(options, prompts)


def _run_profile(options: argparse.Namespace) -> int:
    _check_prompts(options.prompt)
    _keep_programs(options)
    from jaxkv.cli.profile import run_profile

    return run_profile(options)


def _run_demo(options: argparse.Namespace) -> int:
    _keep_programs(options)
    from jaxkv.cli.demo import run_demo

    return run_demo(options)


_COMMANDS = {"generate": _run_generate, "profile": _run_profile, "demo": _run_demo, "plan": run_plan}


def _keep_programs(options: argparse.Namespace) -> None:
    keep_programs(options.compilation_cache, enabled=not options.no_compilation_cache)


def _read_prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        try:
            text = options.prompts_file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{options.prompts_file}: is not UTF-8 at byte {error.start}") from None
        except ValueError as error:
            raise ValueError(f"--prompts-file {str(options.prompts_file)!r}: {error}") from None
        # Not `splitlines`: other separators are part of a text. A byte order mark is not.
        prompts += [line for line in re.split("\r\n|\n|\r", text.removeprefix("\ufeff")) if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompts-file FILE with at least one line")
    if not options.model:
        raise ValueError("--model is empty")
    _check_prompts(prompts)
    if options.system is not None and not options.chat:
        raise ValueError("--system needs --chat")
    return prompts


def _check_prompts(prompts: list[str]) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty")
        if not _is_utf8(prompt):
            raise ValueError(f"prompt {number} is not UTF-8")


def _check_stop(stop: list[str]) -> None:
    for text in stop:
        if not text:
            raise ValueError("--stop is empty")
        if not _is_utf8(text):
            raise ValueError(f"--stop {text!r} is not UTF-8")


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def entry_point() -> None:
    """What the installed `jaxkv` command calls."""
    code = main()
    sys.stdout.flush()
    # Threads of the runtime may still be in a computation that Ctrl-C left behind.
    os._exit(code) if code == 130 else sys.exit(code)
