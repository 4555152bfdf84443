"""`python -m jaxkv.cli`, same as the installed `jaxkv`."""

from jaxkv.cli import entry_point

if __name__ == "__main__":
    entry_point()
