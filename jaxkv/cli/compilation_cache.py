"""Keeps compiled programs between runs of the command, in JAX's persistent compilation cache.

JAX's key of a program includes the versions of JAX and XLA, the options, the device, and on a CPU its
instruction set. So machines may share a directory, and an upgrade compiles again.
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
      RuntimeError: if there is no home directory.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG standard ignores relative paths.
    return (root if root.is_absolute() else Path.home() / ".cache") / "jaxkv"


def keep_programs(directory: Path | None = None, *, enabled: bool = True) -> None:
    """Keeps compiled programs between runs. Call it before anything is compiled.

    If the directory cannot be used, prints a warning on standard error and keeps nothing.

    Args:
      directory: the directory. Default: JAX's own setting, else `default_directory`.
      enabled: False neither keeps programs nor uses kept ones.
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
        where = f" in {error.filename}" if isinstance(error, OSError) and error.filename else ""
        _warn(f"compiled programs are not kept{where}: {reason}; choose another with --compilation-cache DIR")
        return
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX's default keeps only programs that took a second; here there are many small ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _shorten_warnings(chosen)


def _private(directory: Path) -> Path:
    """Creates a directory that only the user can write to: writers can run code in this process."""
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
    """Reports entries that cannot be read or written in one line, once; JAX then compiles the program."""
    show, seen = warnings.showwarning, []

    def show_once(message, category, filename, lineno, file=None, line=None):
        if "persistent compilation cache" not in str(message):
            show(message, category, filename, lineno, file, line)
        elif not seen:
            seen.append(message)
            _warn(f"{' '.join(str(message).split())}; if this repeats, empty {directory}")

    warnings.showwarning = show_once


def _warn(text: str) -> None:
    print(f"jaxkv: warning: {text}", file=sys.stderr, flush=True)
