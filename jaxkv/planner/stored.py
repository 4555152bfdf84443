"""Bytes of the weight files on disk."""

from pathlib import Path

from jaxkv.checkpoints.hf_folder import INDEX_FILE, WHOLE_FILE, read_json, shard_files, shown


def safetensors_bytes(folder: Path) -> int | None:
    """Bytes of a model's safetensors weights, of the files that the loader reads; None if one is missing.

    Taken from the index (`metadata.total_size`), else from the file sizes, whose headers are negligible.

    Raises:
      ValueError: for a damaged index, or shards of different sets.
    """
    if (whole := folder / WHOLE_FILE).is_file():
        return whole.stat().st_size
    index = folder / INDEX_FILE
    if index.is_file():
        metadata = read_json(index).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if isinstance(total, bool) or not isinstance(total, (int, float)) or not 1 <= total < 2**53:
            raise ValueError(f"{index}: metadata.total_size must be a positive number, not {shown(total)}")
        return int(total)
    parts, missing = shard_files(folder)
    # A download may have stopped early.
    return sum(part.stat().st_size for part in parts) if parts and not missing else None
