"""Checks numeric arguments from Python, NumPy or JAX and converts them to Python numbers."""

import operator

import numpy as np


def integer(name: str, value: object, *, least: int = 1, below: int = 2**30) -> int:
    """The value as a Python integer.

    Args:
      name: of the argument, for the error.
      value: an integer, or an integer scalar of NumPy or JAX; not a bool.
      least: smallest allowed value.
      below: upper bound, exclusive.

    Raises:
      ValueError: naming the argument, its value and what is allowed.

    Example:
      >>> import numpy as np
      >>> integer("block", np.int32(16))
      16
    """
    number = whole(value)
    if number is None or not least <= number < below:
        kind = {0: "a non-negative", 1: "a positive"}.get(least, f"at least {least}, an")
        raise ValueError(f"{name}={value!r} must be {kind} integer below {below}")
    return number


def whole(value: object) -> int | None:
    """The value as a Python integer; None if it is not one: a bool, a float, a traced value.

    Example:
      >>> import numpy as np
      >>> whole(np.int64(8)), whole(np.True_), whole(8.0)
      (8, None, None)
    """
    try:
        return None if _is_bool(value) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def real(value: object) -> float | None:
    """The value as a Python float; None if it is not a number: a bool, text, an array of several.

    Example:
      >>> import numpy as np
      >>> real(np.float32(0.5)), real(3), real(np.True_)
      (0.5, 3.0, None)
    """
    if _is_bool(value) or isinstance(value, (str, bytes, bytearray)) or getattr(value, "ndim", 0):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def _is_bool(value: object) -> bool:
    # Includes arrays of one bool.
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.dtype(bool)
