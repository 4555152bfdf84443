"""Chooses the backend for a call.

An operation is a folder. Each of its backends is a module (or folder) in it, named as in `_REGISTRY`, with

    lacks(call)                 what the backend lacks for the call, or None
    run(call, *, interpret)     the result

where `call` is the operation's record of checked arguments. To add a backend, add a line to the registry and
a module for each operation that it supports.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import jax

logger = logging.getLogger("pallas_kernels")


class _Registered(NamedTuple):
    """A possible backend, and whether it needs a GPU (or the interpreter)."""

    name: str
    needs_gpu: bool


# "auto" takes the first that supports the call.
_REGISTRY = (
    _Registered("mosaic", needs_gpu=True),
    _Registered("triton", needs_gpu=True),
    _Registered("xla", needs_gpu=False),
)
BACKENDS = tuple(one.name for one in _REGISTRY)


class Backend(NamedTuple):
    """A backend, and whether its kernels run in Pallas' interpreter, which is slow but needs no GPU."""

    name: str
    interpret: bool = False


# The backend of "auto". It is part of the key of every `jit` cache, so changing it compiles again.
_auto = jax.make_user_context(default_value=None)


@contextmanager
def use_backend(name: str, *, interpret: bool = False) -> Iterator[None]:
    """A context in which "auto" means this backend, interpreted if `interpret`.

    A function that `jit` compiled for another choice is compiled again. The platform is not checked, so a
    program can be compiled for a GPU that is not present.

    Args:
      name: one of `BACKENDS`.
      interpret: run kernels without a GPU, slowly, for tests.

    Raises:
      ValueError: for an unknown backend.

    Example:
      >>> import jax.numpy as jnp, pallas_kernels
      >>> pages = jnp.zeros((1, 2, 1, 4, 16))
      >>> token, page, offset = jnp.ones((1, 1, 16)), jnp.array([1]), jnp.array([3])
      >>> with pallas_kernels.use_backend("triton", interpret=True):
      ...     pages, _ = pallas_kernels.append_kv(pages, pages, token, token, page, offset)
      >>> float(pages[0, 1, 0, 3, 0])
      1.0
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    with _auto(Backend(name, interpret)):
        yield


def auto_backend(operation: str = "paged_attention") -> Backend:
    """The backend that "auto" selects for an operation on this machine, for a call that it supports."""
    if _auto.value is not None:
        return _auto.value
    return Backend(next(one.name for one in _REGISTRY if _module(operation, one.name) and _runs_here(one)))


def serve(operation: str, call: Any, *, backend: str, interpret: bool | None = None) -> Any:
    """Runs a call on a backend that supports it.

    Args:
      operation: name of the operation and of its folder.
      call: its record of arguments.
      backend: "auto", or one of `BACKENDS`.
      interpret: run kernels in Pallas' interpreter, without a GPU. None: as set by `use_backend`.

    Raises:
      ValueError: for an unknown backend.
      NotImplementedError: for a backend given by name that does not support the call.
    """
    meant = _auto.value
    if interpret is None:
        interpret = meant is not None and meant.interpret
    if backend == "auto" and meant is None:
        module = _first_that_serves(operation, call)
    else:
        name = meant.name if backend == "auto" and meant is not None else backend
        module = _asked_for(operation, call, name, interpret)
    logger.debug("%s: backend %s on %s", operation, module.__name__, jax.default_backend())
    return module.run(call, interpret=interpret)


def _first_that_serves(operation: str, call: Any) -> ModuleType:
    for one in _REGISTRY:
        # A module is imported only if it can run on this platform.
        if _runs_here(one) and (module := _module(operation, one.name)) and module.lacks(call) is None:
            return module
    raise NotImplementedError(f"no backend of {operation} supports this call")


def _asked_for(operation: str, call: Any, name: str, interpret: bool) -> ModuleType:
    registered = {one.name: one for one in _REGISTRY}
    if name not in registered:
        raise ValueError(f"backend={name!r} is not one of auto, {', '.join(BACKENDS)}")
    module = _module(operation, name)
    if module is None:
        available = ", ".join(one for one in BACKENDS if _module(operation, one))
        raise NotImplementedError(f"the {name} backend has no {operation} kernel yet; available: {available}")
    meant = _auto.value is not None and _auto.value.name == name
    if interpret or meant or _runs_here(registered[name]):
        reason = module.lacks(call)
    else:
        reason = "a GPU (`use_backend` interprets it without one, or compiles it for one elsewhere)"
    if reason is not None:
        raise NotImplementedError(f"the {name} backend of {operation} lacks {reason}")
    return module


def _runs_here(one: _Registered) -> bool:
    return not one.needs_gpu or jax.default_backend() == "gpu"


@cache
def _module(operation: str, name: str) -> ModuleType | None:
    path = f"pallas_kernels.{operation}.{name}"
    return None if find_spec(path) is None else import_module(path)
