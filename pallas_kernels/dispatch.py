"""Which backend serves a call."""

import logging

import jax

logger = logging.getLogger("pallas_kernels")

BACKENDS = ("xla", "triton", "mosaic")


def choose_backend(operation: str, backend: str, available: tuple[str, ...] = ("xla",)) -> str:
    """The backend that serves `operation`.

    Args:
      operation: its name, for messages.
      backend: "auto", or one of `BACKENDS`.
      available: the backends that `operation` has, best first.

    Raises:
      ValueError: for a name that is no backend.
      NotImplementedError: for a backend asked for by name that cannot serve the operation.
    """
    if backend == "auto":
        chosen = available[0]
        logger.debug("%s: backend %s on %s", operation, chosen, jax.default_backend())
        return chosen
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if backend not in available:
        raise NotImplementedError(
            f"the {backend} backend has no {operation} kernel yet; available: {', '.join(available)}"
        )
    return backend
