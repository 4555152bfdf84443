"""The command line: `jaxkv generate`, `jaxkv serve`, `jaxkv profile`, `jaxkv demo` and `jaxkv plan`.

A user's mistake prints one line on standard error, with exit code 2. Ctrl-C exits with code 130.
"""

import argparse
import io
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from jaxkv.cli import demo, generate, plan, profile, serve
from jaxkv.cli.options import EPILOG
from jaxkv.cli.reporting import Parser, exit_code, leave

# Each has `HELP`, `add_arguments(parser)` and `run(options)`, which returns the exit code. Modules that need
# the optional dependencies of `models` are imported when the command runs.
COMMANDS = {"generate": generate, "serve": serve, "profile": profile, "demo": demo, "plan": plan}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    _escape_unencodable()
    options = parser().parse_args(arguments)
    return exit_code("jaxkv", lambda: COMMANDS[options.command].run(options))


def parser() -> argparse.ArgumentParser:
    """Parses a command line. The name of the command is `command`."""
    top = Parser(prog="jaxkv", description="A paged KV cache for JAX.", epilog=EPILOG)
    top.add_argument("--version", action="version", version=_versions(), help="show versions, and exit")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    return top


def _versions() -> str:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:  # a source tree on the path
            return "(not installed)"

    return f"jaxkv {of('jaxkv')} (jax {of('jax')}, jaxlib {of('jaxlib')}, Python {platform.python_version()})"


def _escape_unencodable() -> None:
    """Writes characters that the encoding lacks as escapes; otherwise the first would raise."""
    for stream in (sys.stdout, sys.stderr):
        # Keeps other error handlers, which the user chose, as by PYTHONIOENCODING.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def entry_point() -> None:
    """What the installed `jaxkv` command calls."""
    leave(main())
