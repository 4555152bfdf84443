"""Tuning tables from a search on a GPU: how `paged_attention` is divided, by class of shapes.

One TOML file per GPU, named by JAX's name of the device:

    device = "NVIDIA H100 80GB HBM3"

    [[shape]]
    queries = "one"          # per sequence; or "many"
    head_dim = 128
    group = 4                # query heads per KV head, rounded up to a power of two
    pool = "bfloat16"
    dtype = "bfloat16"       # of the queries
    key_tile = 64            # and other fields of `Values` that were faster than the rule of `tuning`

The user's file, named by the environment variable JAXKV_TUNING, takes precedence over those in `tables/`
beside this module. A file is read once per process, when a program is first traced.
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.formats import Format
from pallas_kernels.sizes import next_power_of_two

VARIABLE = "JAXKV_TUNING"
_OURS = Path(__file__).with_name("tables")


@dataclass(frozen=True, slots=True)
class Shape:
    """A class of shapes with the same tuning.

    Attributes:
      queries: "one" per sequence on average, or "many".
      head_dim: of the pool.
      group: query heads per KV head, rounded up to a power of two.
      pool, dtype: names of the pool's dtype, and of the queries'.
    """

    queries: str
    head_dim: int
    group: int
    pool: str
    dtype: str

    @classmethod
    def of(
        cls, *, tokens: int, seqs: int, group: int, head_dim: int, storage: Format, q_dtype: DTypeLike
    ) -> "Shape":
        """From the arguments of `tuning.choose`."""
        names = storage.kernel_dtype, jnp.dtype(q_dtype).name
        many = ceil(tokens / seqs) > 1
        return cls("many" if many else "one", head_dim, next_power_of_two(group), *names)

    def __post_init__(self):
        if self.queries not in ("one", "many"):
            raise ValueError(f"queries={self.queries!r} must be 'one' or 'many'")
        for name in ("head_dim", "group"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive integer")
        if self.group != next_power_of_two(self.group):
            raise ValueError(f"group={self.group} must be a power of two")
        for name in ("pool", "dtype"):
            try:
                jnp.dtype(getattr(self, name))
            except TypeError:
                raise ValueError(f"{name}={getattr(self, name)!r} is not a dtype") from None


@dataclass(frozen=True, slots=True)
class Values:
    """Values of a `Tuning`; None keeps the value of the rule of `tuning`.

    Attributes:
      query_tile, key_tile, num_warps, num_stages: as there; a query tile is at most as long as the sequences.
      programs: resident programs per multiprocessor.
    """

    query_tile: int | None = None
    key_tile: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    programs: int | None = None

    def __post_init__(self):
        for name, value in self.given.items():
            if not _is_count(value):
                raise ValueError(f"{name}={value!r} must be a positive integer")
        for name in ("query_tile", "key_tile", "num_warps"):
            if name in self.given and self.given[name] != next_power_of_two(self.given[name]):
                raise ValueError(f"{name}={self.given[name]} must be a power of two")
        if (self.key_tile or 16) < 16:
            raise ValueError(f"key_tile={self.key_tile} must be 16 or more, for matrix units")

    @property
    def given(self) -> dict[str, Any]:
        """Those that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def find(device: str, shape: Shape) -> Values:
    """The values in the tables for a shape on a GPU; none if they lack the shape.

    Args:
      device: its name, `jax.Device.device_kind`.
      shape: the shape.

    Raises:
      ValueError: for an invalid table, naming the file and the key.
      OSError: if JAXKV_TUNING names a file that cannot be read.
    """
    own, ours = os.environ.get(VARIABLE), _OURS / f"{file_name(device)}.toml"
    for path in [*([Path(own)] if own else []), *([ours] if ours.exists() else [])]:
        kind, table = read(path)
        if kind == device and shape in table:
            return table[shape]
    return Values()


def file_name(device: str) -> str:
    """The file name for a device, without suffix: `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@cache
def read(path: Path) -> tuple[str, Mapping[Shape, Values]]:
    """The GPU and table of a file; raises as `find`."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    if unknown := sorted(set(document) - {"device", "shape"}):
        raise ValueError(f"{path}: {unknown[0]!r} is not one of device, shape")
    device, rows = document.get("device"), document.get("shape", [])
    if not isinstance(device, str) or not isinstance(rows, list):
        raise ValueError(f'{path} needs device = "its name", and tables [[shape]]')
    return device, MappingProxyType(dict(_row(path, number, row) for number, row in enumerate(rows, 1)))


def write(path: Path, device: str, table: Mapping[Shape, Values], comment: str = "") -> None:
    """The inverse of `read`, with a comment at the top."""
    # Integers and these strings have the same form in TOML as in JSON.
    lines = [f"# {line}" for line in comment.splitlines()] + [f"device = {json.dumps(device)}"]
    for shape, values in table.items():
        row = {**asdict(shape), **values.given}
        lines += ["", "[[shape]]", *(f"{name} = {json.dumps(value)}" for name, value in row.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(path: Path, number: int, row: Any) -> tuple[Shape, Values]:
    where = f"{path}: shape {number}"
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a table")
    needed, others = ([field.name for field in fields(kind)] for kind in (Shape, Values))
    if missing := [name for name in needed if name not in row]:
        raise ValueError(f"{where} lacks {missing[0]}")
    if unknown := sorted(set(row) - {*needed, *others}):
        raise ValueError(f"{where}: {unknown[0]!r} is not one of {', '.join([*needed, *others])}")
    try:
        shape = Shape(**{name: row[name] for name in needed})
        return shape, Values(**{name: row[name] for name in others if name in row})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**20
