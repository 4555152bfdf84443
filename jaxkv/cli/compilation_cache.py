"""Compiled programs that are kept between runs of the command, in JAX's own persistent cache.

JAX's key of a program covers the versions of JAX and XLA, the options, the device, and on a CPU its
instruction set: a directory may be shared by machines, and an upgrade compiles again.
"""

import os
import stat
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax


def default_directory() -> Path:
    """`$XDG_CACHE_HOME/jaxkv`, or `~/.cache/jaxkv`.

    Raises:
      RuntimeError: where there is no home directory.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The standard says to ignore a relative path.
    return (root if root.is_absolute() else Path.home() / ".cache") / "jaxkv"


def keep_programs(directory: Path | None = None, *, enabled: bool = True) -> None:
    """Keeps programs between runs; to be called before anything is compiled.

    A directory that cannot be used is a warning on standard error, and nothing is kept.

    Args:
      directory: where. Default: what JAX is told by its own settings, else `default_directory`.
      enabled: False keeps nothing, and uses nothing that was kept.
    """
    if not enabled:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    config: Any = jax.config  # its options are unknown to a type checker
    if directory is None and (config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache):
        return
    try:
        chosen = _private(default_directory()) if directory is None else directory
        _check_writable(chosen)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        place = f" in {error.filename}" if isinstance(error, OSError) and error.filename else ""
        _warn(f"compiled programs are not kept{place}: {reason}; --compilation-cache DIR names another place")
        return
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By itself JAX keeps what took a second; of the small programs there are many.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _shorten_warnings(chosen)


def _private(directory: Path) -> Path:
    """A directory of the user alone: who can write there can run code in this process."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH):
        raise PermissionError(None, "another user can write there", str(directory))
    return directory


def _check_writable(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def _shorten_warnings(directory: Path) -> None:
    """An entry that cannot be read or written is one line; the program is compiled as without a cache."""
    show, seen = warnings.showwarning, []

    def show_once(message, category, filename, lineno, file=None, line=None):
        if "persistent compilation cache" not in str(message):
            show(message, category, filename, lineno, file, line)
        elif not seen:
            seen.append(message)
            _warn(f"{' '.join(str(message).split())}; an empty {directory} helps if this stays")

    warnings.showwarning = show_once


def _warn(text: str) -> None:
    print(f"jaxkv: warning: {text}", file=sys.stderr, flush=True)
