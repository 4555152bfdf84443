"""Names the optional dependency group to install when a package is missing."""

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
    """A context in which a failed import says what to install.

    Raises:
      ModuleNotFoundError: with the package, and the dependency group of jaxkv that includes it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if _package(error) not in _EXTRAS:
            raise
        raise ModuleNotFoundError(missing(error), name=error.name) from error


def missing(error: ModuleNotFoundError) -> str:
    """The message for a missing package, one line."""
    package = _package(error)
    advice = f"; pip install 'jaxkv[{_EXTRAS[package]}]'" if package in _EXTRAS else ""
    return f"{package or 'a module'} is missing{advice}"


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]
