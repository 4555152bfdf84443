"""Which backend serves a call."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import jax

logger = logging.getLogger("pallas_kernels")

BACKENDS = ("xla", "triton", "mosaic")


class Backend(NamedTuple):
    """A backend, and whether its kernels run in Pallas' interpreter, which needs no GPU and is slow."""

    name: str
    interpret: bool = False


# What "auto" means; part of the key of every `jit` cache, so that a change of it is a change of program.
_auto = jax.make_user_context(default_value=None)


@contextmanager
def use_backend(name: str, *, interpret: bool = False) -> Iterator[None]:
    """Within it, "auto" means this backend, and its kernels are interpreted if asked for.

    A function that `jit` has compiled for another choice is compiled again. The platform is not looked
    at, so that a program can be compiled for a GPU that is not there.

    Args:
      name: one of `BACKENDS`.
      interpret: run kernels without a GPU, slowly, for tests.

    Raises:
      ValueError: for a name that is no backend.

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


def auto_backend() -> Backend:
    """What "auto" means, here and now."""
    return _auto.value or Backend("triton" if jax.default_backend() == "gpu" else "xla")


def choose_backend(
    operation: str, backend: str, lacks: Mapping[str, str | None], interpret: bool | None = None
) -> Backend:
    """The backend that serves a call.

    Args:
      operation: its name, for messages.
      backend: "auto", or one of `BACKENDS`.
      lacks: what each backend of the operation lacks for this call; None if nothing.
      interpret: None is as `use_backend` says.

    Raises:
      ValueError: for a name that is no backend.
      NotImplementedError: for a backend asked for by name that cannot serve the call.
    """
    asked = auto_backend()
    if interpret is None:
        interpret = asked.interpret
    if backend == "auto":
        name = asked.name
        # What nobody asked for by name is served by another, if need be.
        if _auto.value is None and lacks.get(name, "") is not None:
            name = "xla"
    else:
        name = backend
    if name not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if name not in lacks:
        raise NotImplementedError(
            f"the {name} backend has no {operation} kernel yet; available: {', '.join(lacks)}"
        )
    reason = lacks[name]
    meant = _auto.value is not None and _auto.value.name == name
    if name != "xla" and not interpret and not meant and jax.default_backend() != "gpu":
        reason = "a GPU (`use_backend` interprets it without one, or compiles it for one elsewhere)"
    if reason is not None:
        raise NotImplementedError(f"the {name} backend of {operation} lacks {reason}")
    logger.debug("%s: backend %s on %s", operation, name, jax.default_backend())
    return Backend(name, interpret)
