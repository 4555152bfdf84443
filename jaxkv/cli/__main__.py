"""`python -m jaxkv.cli`, the same as the installed `jaxkv`."""

from jaxkv.cli import entry_point

entry_point()
