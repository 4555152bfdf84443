"""How a command ends: a user's mistake is one line on standard error and code 2; Ctrl-C is code 130."""

import argparse
import os
import sys
from collections.abc import Callable

import jax

from jaxkv.errors import JaxKVError
from jaxkv.extras import missing


class Parser(argparse.ArgumentParser):
    """Says of a mistake on the command line what it is, in one line."""

    def error(self, message: str):
        """Ends with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def exit_code(name: str, run: Callable[[], int]) -> int:
    """Runs a command of this name and returns its exit code."""
    try:
        return run()
    except BrokenPipeError:
        # Whoever read has seen enough, as `head` does. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        what, where = error.strerror, error.filename
        reason = str(error) if what is None or where is None else f"{where}: {what.lower()}"
        return _failed(name, " ".join(reason.split()))
    except (ValueError, JaxKVError) as error:
        return _failed(name, " ".join(str(error).split()))
    except ModuleNotFoundError as error:
        return _failed(name, missing(error))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("RESOURCE_EXHAUSTED"):
            reason += " (fewer pages, or a smaller --kv-dtype, take less memory)"
        return _failed(name, f"the device refused: {reason}")
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)
        return 130


def _failed(name: str, reason: str) -> int:
    print(f"{name}: error: {reason}", file=sys.stderr)
    return 2


def leave(code: int):
    """Ends the process."""
    sys.stdout.flush()
    # Threads of the runtime may still be in a computation that Ctrl-C left behind.
    os._exit(code) if code == 130 else sys.exit(code)
