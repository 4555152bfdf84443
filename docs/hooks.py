"""Adds pages to the site: files of the repository, and the help of the commands."""

import os
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from docs.pages import PAGES  # noqa: E402
from jaxkv.cli.command_line import COMMANDS  # noqa: E402
from jaxkv.cli.reporting import Parser  # noqa: E402


def commands() -> str:
    """The help of every command, as it is printed."""
    os.environ["COLUMNS"] = "100"
    parts = [
        "# Commands",
        "",
        "Each is a subcommand of `jaxkv`. A mistake is one line on standard error, and status 2.",
    ]
    for name, command in COMMANDS.items():
        parser = Parser(prog=f"jaxkv {name}")
        command.add_arguments(parser)
        parts += [
            "",
            f"## jaxkv {name}",
            "",
            command.HELP,
            "",
            "```",
            parser.format_help().rstrip(),
            "```",
        ]
    return "\n".join(parts) + "\n"


def on_files(files, config):
    files.append(
        File.generated(config, "api/commands.md", content=commands())
    )
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(
            File.generated(
                config, f"results/{picture.name}", abs_src_path=str(picture)
            )
        )
    return files
