"""Parses and formats amounts of memory."""

import re
from collections.abc import Iterable
from math import floor, log10

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    # A bare letter is a binary unit, as in `free -h` and `nvidia-smi`.
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power, _letter: 1024**_power}


def parse_bytes(text: str | int) -> int:
    """Bytes of `24GiB`, `80 GB`, `1.5e9` or a plain number.

    Raises:
      ValueError: for anything else, and for amounts that are not positive.

    Example:
      >>> parse_bytes("24GiB"), parse_bytes("80 GB"), parse_bytes(512)
      (25769803776, 80000000000, 512)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e\+?[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text), re.IGNORECASE)
    unit = found and _UNITS.get(found[2].lower())
    try:
        amount = float(found[1]) * unit if found and unit else 0.0
    except ValueError:
        amount = 0.0
    if isinstance(text, bool) or not 1 <= amount < 2**60:
        raise ValueError(f"{str(text)!r} is not an amount of memory; write it like 24GiB, 80GB or 512MiB")
    return round(amount)


_BINARY = {"B": 1} | {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}


def common_unit(amounts: Iterable[float]) -> str:
    """The unit for amounts in one table: the unit of the largest.

    Example:
      >>> unit = common_unit([2**30, 3 * 2**20])
      >>> format_bytes(2**30, unit), format_bytes(3 * 2**20, unit), format_bytes(0, unit)
      ('1.00 GiB', '0.0029 GiB', '0 GiB')
    """
    return format_bytes(max(map(abs, amounts), default=0)).rpartition(" ")[2]


def format_bytes(amount: float, unit: str | None = None) -> str:
    """Three or four digits and a binary unit.

    Args:
      amount: bytes.
      unit: B, KiB, MiB, GiB or TiB. Default: the largest one in which the value is at least about 1.

    Example:
      >>> format_bytes(2**30), format_bytes(1536), format_bytes(-3 * 2**20)
      ('1.00 GiB', '1.50 KiB', '-3.00 MiB')
    """
    if unit is not None:
        return f"{_number(amount / _BINARY[unit])} {unit}"
    size, unit = float(amount), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1023.5:
            break
        size, unit = size / 1024, larger
    if unit == "B":
        return f"{size:.0f} B"
    return f"{size:.2f} {unit}" if abs(size) < 100 else f"{size:.1f} {unit}"


def format_mebibytes(amount: float) -> str:
    """Always in MiB, for tables whose amounts are compared.

    Example:
      >>> format_mebibytes(3 * 2**40), format_mebibytes(2**20 + 2**19), format_mebibytes(6000)
      ('3,145,728 MiB', '1.5 MiB', '0.0057 MiB')
    """
    if abs(amount) < 2**20:
        return format_bytes(amount, "MiB")
    return f"{amount / 2**20:,.1f} MiB".replace(".0 MiB", " MiB")


def _number(value: float) -> str:
    """At least two significant digits."""
    if value == int(value) and (value == 0 or abs(value) >= 100):
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:,.1f}"
    return f"{value:.{max(2, 1 - floor(log10(abs(value))))}f}"
