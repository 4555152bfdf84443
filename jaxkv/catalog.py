"""The data in `configs/`: models as Hugging Face describes them, presets of caches, devices."""

import tomllib
from pathlib import Path
from typing import Any

# In a wheel it lies in the package, in a checkout beside it.
_HERE = Path(__file__).parent
_CONFIGS = next(
    (folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()), _HERE
)
_ENDINGS = {"models": ".json", "presets": ".toml", "devices": ".toml"}


def names(kind: str) -> list[str]:
    """What there is of `models`, `presets` or `devices`, sorted."""
    return sorted(path.stem for path in (_CONFIGS / kind).glob(f"*{_ENDINGS[kind]}"))


def find(kind: str, name: str) -> Path:
    """The file of a name, whose case, spaces, dashes and underscores do not matter.

    Raises:
      ValueError: when there is none; it says which there are.
    """
    by_name = {_plain(known): known for known in names(kind)}
    if _plain(name) not in by_name:
        raise ValueError(f"{name!r} is not one of the known {kind}: {', '.join(names(kind))}")
    return _CONFIGS / kind / (by_name[_plain(name)] + _ENDINGS[kind])


def read(kind: str, name: str) -> dict[str, Any]:
    """The contents of a preset or a device.

    Raises:
      ValueError: as `find`.
    """
    return tomllib.loads(find(kind, name).read_text())


def _plain(name: str) -> str:
    return str(name).lower().replace("_", "").replace("-", "").replace(" ", "")
