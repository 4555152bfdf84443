"""The command line: one file for each command."""

from jaxkv.cli.command_line import entry_point as entry_point
from jaxkv.cli.command_line import main as main
