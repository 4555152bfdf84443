"""Bytes of the weight files on disk."""

from collections.abc import Mapping
from pathlib import Path

from jaxkv.checkpoints.hf_folder import INDEX_FILE, WHOLE_FILE, read_json, shard_files, shown


def safetensors_bytes(folder: Path) -> int | None:
    """Bytes of a model's safetensors weights, of the files that the loader reads; None if one is missing.

    Taken from the index (`metadata.total_size`), else, as merged models leave that out, from the file sizes,
    whose headers are negligible.

    Raises:
      ValueError: for a damaged index, or shards of different sets.
    """
    if (whole := folder / WHOLE_FILE).is_file():
        return whole.stat().st_size
    index = folder / INDEX_FILE
    if index.is_file():
        raw = read_json(index)
        metadata = raw.get("metadata") or {}
        total = metadata.get("total_size") if isinstance(metadata, dict) else shown(metadata)
        if total is None:
            return _listed_bytes(folder, raw.get("weight_map"))
        if isinstance(total, bool) or not isinstance(total, (int, float)) or not 1 <= total < 2**53:
            raise ValueError(f"{index}: metadata.total_size must be a positive number, not {shown(total)}")
        return int(total)
    parts, missing = shard_files(folder)
    # A download may have stopped early.
    return sum(part.stat().st_size for part in parts) if parts and not missing else None


def _listed_bytes(folder: Path, weight_map: object) -> int | None:
    """Bytes of the files that an index lists; None if one is missing."""
    names = set(map(str, weight_map.values())) if isinstance(weight_map, Mapping) else set()
    # An index must not point outside its folder.
    files = [folder / name for name in names if Path(name).name == name]
    complete = files and len(files) == len(names) and all(file.is_file() for file in files)
    return sum(file.stat().st_size for file in files) if complete else None
