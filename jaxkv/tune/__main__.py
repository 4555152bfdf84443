"""`python -m jaxkv.tune`."""

from jaxkv.cli.reporting import exit_code, leave
from jaxkv.tune.command import NAME, main

if __name__ == "__main__":
    leave(exit_code(NAME, main))
