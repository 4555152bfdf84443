"""Pages of the site that are files of the repository: one source for both."""

import os
from pathlib import Path

from mkdocs.structure.files import File

from jaxkv.cli.command_line import COMMANDS
from jaxkv.cli.reporting import Parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "benchmarks.md": "benchmarks/README.md",
    "project/changes.md": "CHANGELOG.md",
    "project/contributing.md": "CONTRIBUTING.md",
    "project/security.md": "SECURITY.md",
}


def commands() -> str:
    """The help of every command, as it is printed."""
    os.environ["COLUMNS"] = "100"
    parts = ["# Commands", "", "Each is a subcommand of `jaxkv`. A mistake is one line on standard error, and status 2."]
    for name, command in COMMANDS.items():
        parser = Parser(prog=f"jaxkv {name}")
        command.add_arguments(parser)
        parts += ["", f"## jaxkv {name}", "", command.HELP, "", "```", parser.format_help().rstrip(), "```"]
    return "\n".join(parts) + "\n"


def on_files(files, config):
    files.append(File.generated(config, "api/commands.md", content=commands()))
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files
