"""Optional parts of the package: which one brings what, for the error where something is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

_EXTRAS = {
    "flax": "models",
    "gguf": "models",
    "jinja2": "models",
    "rich": "models",
    "safetensors": "models",
    "tokenizers": "models",
    "prometheus_client": "metrics",
    "matplotlib": "plot",
}


@contextmanager
def needs_extra() -> Iterator[None]:
    """Imports inside say what to install where a package is missing.

    Raises:
      ModuleNotFoundError: with the package and the part of jaxkv that brings it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if _package(error) not in _EXTRAS:
            raise
        raise ModuleNotFoundError(missing(error), name=error.name) from error


def missing(error: ModuleNotFoundError) -> str:
    """One line for a package that is missing."""
    package = _package(error)
    advice = f"; pip install 'jaxkv[{_EXTRAS[package]}]'" if package in _EXTRAS else ""
    return f"{package or 'a module'} is missing{advice}"


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]
