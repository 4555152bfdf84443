"""Reads and checks the fields of a `config.json`; errors name the field."""

from collections.abc import Mapping
from typing import Any

from jaxkv.checkpoints.hf_folder import MOST_POSITIONS, shown

# Far above any published model: a larger value means a damaged file.
_MOST = {
    "vocab_size": 2**24,
    "vocab_size_per_layer_input": 2**24,
    "max_position_embeddings": MOST_POSITIONS,
    "sliding_window": MOST_POSITIONS,
    "intermediate_size": 2**20,
    "hidden_size": 2**17,
}
_MOST_OTHERWISE = 2**16


def most(name: str) -> int:
    """The largest plausible value of an integer field."""
    return _MOST.get(name, _MOST_OTHERWISE)


class Fields:
    """The fields of a config, by any of several names."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The first of these fields that exists, else `default`.

        Raises:
          ValueError: for a missing field without a default, or a value that is not an integer in range.
        """
        name, value = self._first(names)
        if value is None:
            if default is None:
                raise ValueError(f"field {names[0]!r} is missing")
            return default
        limit = most(names[0])
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an integer, not {shown(value)}")
        if not least <= value <= limit:
            raise ValueError(f"{name} must be an integer from {least} to {limit}, not {shown(value)}")
        return value

    def optional(self, *names: str) -> int | None:
        """As `integer`, or None if it is missing or null."""
        return None if self._first(names)[1] is None else self.integer(*names)

    def number(self, name: str, default: float | None = None) -> float:
        """As `integer`, for a float of any size; an integer is converted."""
        name, value = self._first((name,))
        if value is None:
            if default is None:
                raise ValueError(f"field {name!r} is missing")
            return default
        if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 1000:
            return float(value)
        if not isinstance(value, float):
            raise ValueError(f"{name} must be a number, not {shown(value)}")
        return value

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

    def layer_types(self, layers: int) -> list[str] | None:
        """The kind of each layer, or None if the config does not say.

        Raises:
          ValueError: unless it is a list of `layers` strings.
        """
        kinds = self.raw.get("layer_types")
        if kinds is None:
            return None
        if not isinstance(kinds, (list, tuple)) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"layer_types must be a list of strings, not {shown(kinds)}")
        if len(kinds) != layers:
            raise ValueError(
                f"layer_types must have an entry for each of {shown(layers)} layers, not {len(kinds)}"
            )
        # Older files call full attention "attention".
        return ["full_attention" if kind == "attention" else kind for kind in kinds]

    def window_pattern(self, layers: int, period: int, *more: str) -> list[bool]:
        """Whether each layer has the window, by `sliding_window_pattern`.

        It is a period, whose last layer has full attention, or a letter for each layer of one, as EXAONE 4's
        "LLLG": L (local) has the window, G (global) has not.

        Args:
          layers: their number.
          period: where the config does not say.
          *more: other names of the field.

        Raises:
          ValueError: for another value.
        """
        name, value = self._first(("sliding_window_pattern", *more))
        if isinstance(value, str):
            if not value or not set(value) <= set("LG"):
                raise ValueError(f"{name} must be an integer, or letters L and G, not {shown(value)}")
            return [value[layer % len(value)] == "L" for layer in range(layers)]
        period = self.integer("sliding_window_pattern", *more, default=period)
        return [(layer + 1) % period != 0 for layer in range(layers)]

    def _first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        return next(
            ((name, self.raw[name]) for name in names if self.raw.get(name) is not None), (names[0], None)
        )
