"""Reading the fields of a `config.json`: every number checked, every complaint naming the field."""

from collections.abc import Mapping
from typing import Any

from jaxkv.checkpoints.hf_folder import MOST_POSITIONS, shown

# Far above any published model: beyond these a number is a damaged file, not a large model.
_MOST = {
    "vocab_size": 2**24,
    "max_position_embeddings": MOST_POSITIONS,
    "sliding_window": MOST_POSITIONS,
    "intermediate_size": 2**20,
    "hidden_size": 2**17,
}
_MOST_OTHERWISE = 2**16


class Fields:
    """The fields of a config by any of their names."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The first of these fields that is there; `default` where none is.

        Raises:
          ValueError: for a missing field without a default, and a value that is no such integer.
        """
        name, value = self._first(names)
        if value is None:
            if default is None:
                raise ValueError(f"field {names[0]!r} is missing")
            return default
        most = _MOST.get(names[0], _MOST_OTHERWISE)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name} must be an integer from {least} to {most}, not {shown(value)}")
        return value

    def optional(self, *names: str) -> int | None:
        """As `integer`, or None where it is missing or null."""
        return None if self._first(names)[1] is None else self.integer(*names)

    def flag(self, name: str, default: bool) -> bool:
        """True or false.

        Raises:
          ValueError: for another value.
        """
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {shown(value)}")
        return value

    def _first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        return next(
            ((name, self.raw[name]) for name in names if self.raw.get(name) is not None), (names[0], None)
        )
