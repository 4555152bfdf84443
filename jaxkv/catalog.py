"""The data in `configs/`: models as Hugging Face describes them, defaults, cache presets, devices."""

import functools
import json
import tomllib
from pathlib import Path
from typing import Any

# A wheel has the folder inside the package, a checkout has it beside the package.
_HERE = Path(__file__).parent
_CONFIGS = next(
    (folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()), _HERE
)
_ENDINGS = {"models": ".json", "presets": ".toml", "devices": ".toml"}


def names(kind: str) -> list[str]:
    """The known names of a kind, `models`, `presets` or `devices`, sorted."""
    return sorted(path.stem for path in (_CONFIGS / kind).glob(f"*{_ENDINGS[kind]}"))


def find(kind: str, name: str) -> Path:
    """The file for a name; case, spaces, dashes and underscores are ignored.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.
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


@functools.cache
def defaults() -> dict[str, dict[str, Any]]:
    """What `transformers` takes for fields that a config leaves out, by `model_type`."""
    return json.loads((_CONFIGS / "defaults.json").read_text())
