"""Loads a Hugging Face model folder: `config.json` and one or more `.safetensors` files."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jaxkv.checkpoints.hf_folder import INDEX_FILE, WHOLE_FILE, one_line, read_json, shard_files, shown
from jaxkv.errors import ModelLoadError
from jaxkv.models.config import ModelConfig
from jaxkv.models.decoder import Decoder
from jaxkv.models.families.registry import family_of, is_wrapper, text_part
from jaxkv.models.tensor_names import TensorNames
from jaxkv.models.tensor_source import TensorSource
from jaxkv.models.weights import Progress, build_model

# What sees images in a model of text and images.
_OTHER_PARTS = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.")
# By their names in the file format. Bytes hold packed weights; other dtypes do not occur in these models.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
}


class SafetensorsFolder:
    """The tensors of a model folder's `.safetensors` files.

    As in `transformers`, `model.safetensors` is the whole model if it exists; else the index lists the files.
    Shards without an index are accepted too, if none is missing.

    Raises:
      ModelLoadError: for a missing or damaged file, or a tensor that is not in the file given by the index.
    """

    def __init__(self, folder: Path):
        self.path = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        self._dtypes: dict[str, np.dtype] = {}
        for file, claimed in _claims(folder).items():
            self._add(file, claimed)

    def _add(self, file: Path, claimed: set[str] | None) -> None:
        """Records the tensors of one file; `claimed` are those that an index lists for it."""
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    if claimed is None and name in self._files:
                        raise ModelLoadError(f"{file}: tensor {name!r} is also in {self._files[name].name}")
                    part = opened.get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    self._dtypes[name] = _dtype(file, name, part.get_dtype())
                    self._files[name] = file
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{file}: is not a readable safetensors file: {one_line(error)}") from None
        for name in sorted(claimed or ()):
            if self._files.get(name) != file:
                raise ModelLoadError(f"{file}: tensor {name!r} is missing; {INDEX_FILE} says it is here")

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own dtype."""
        try:
            with safe_open(self._files[name], framework="numpy") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{self._files[name]}: tensor {name!r}: {one_line(error)}") from None

    def num_bytes(self, name: str) -> int:
        """Bytes of one tensor in its file."""
        return int(np.prod(self.shapes[name])) * self._dtypes[name].itemsize


class TextPart:
    """The language model's tensors of a checkpoint that holds more, by the names they have in its own."""

    def __init__(self, whole: SafetensorsFolder):
        self.path, self._whole = whole.path, whole
        self._names = {name.replace("language_model.", "", 1): name for name in whole.shapes}
        self.shapes = {
            text: whole.shapes[name] for text, name in self._names.items() if not _OTHER_PARTS.search(name)
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own dtype."""
        return self._whole.read(self._names[name])

    def num_bytes(self, name: str) -> int:
        """Bytes of one tensor in its file."""
        return self._whole.num_bytes(self._names[name])


def load_hf(
    folder: Path, *, dtype: DTypeLike, max_context: int | None = None, progress: Progress | None = None
) -> tuple[Decoder, ModelConfig]:
    """Reads a model folder.

    Args:
      folder: holds `config.json` and the weights.
      dtype: of the model's matrices.
      max_context: tokens of the longest context, as for `load`.
      progress: called after each tensor; see `Progress`.

    Raises:
      ModelLoadError: naming the file and the fault.
      ValueError: for a context longer than the model supports.
    """
    try:
        raw = read_json(folder)
        config, family = ModelConfig.from_hf(raw), family_of(text_part(raw))
    except ValueError as error:
        message = str(error)
        named = message.startswith(str(folder))
        raise ModelLoadError(message if named else f"{folder / 'config.json'}: {message}") from None
    config, whole = config.for_context(max_context), SafetensorsFolder(folder)
    source, names = family.hf_source(TextPart(whole) if is_wrapper(raw) else whole), family.hf_names
    if config.tied_embeddings and not _is_tied(source, names):
        config = dataclasses.replace(config, tied_embeddings=False)

    def ignored(name: str) -> bool:
        # Old checkpoints have the rotary frequencies; some tied ones have the embedding table twice.
        return name.endswith(".rotary_emb.inv_freq") or (name == names.unembedding and config.tied_embeddings)

    model = build_model(config, source, names, dtype=dtype, ignored=ignored, progress=progress)
    return model, config


def _is_tied(source: TensorSource, names: TensorNames) -> bool:
    """Whether the checkpoint's output projection is its embedding table; a config may wrongly say so."""
    both = names.embedding, names.unembedding
    if any(name not in source.shapes for name in both):
        return True
    table, output = map(source.read, both)
    return np.array_equal(table, output)


def _claims(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensors that the index lists for it; None without an index."""
    if (folder / WHOLE_FILE).is_file():
        return {folder / WHOLE_FILE: None}
    if not (folder / INDEX_FILE).is_file():
        return dict.fromkeys(_shards(folder))
    try:
        weight_map = read_json(folder / INDEX_FILE)["weight_map"]
    except (ValueError, KeyError):
        raise ModelLoadError(f"{folder / INDEX_FILE}: is not a JSON object with a weight_map") from None
    claims: dict[Path, set[str]] = {}
    for name, file in _string_items(folder / INDEX_FILE, weight_map):
        # Only a file name: an index must not point outside its folder.
        if Path(file).name != file:
            raise ModelLoadError(f"{folder / INDEX_FILE}: {shown(file)} is not a file name")
        claims.setdefault(folder / file, set()).add(name)
    return dict(claims)


def _shards(folder: Path) -> list[Path]:
    """The shards of a folder without an index; raises if one is missing."""
    try:
        files, missing = shard_files(folder)
    except ValueError as error:
        raise ModelLoadError(str(error)) from None
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(f"{folder}: has {len(files)} of the model's shards; {missing[0]}{more} missing")
    if not files:
        shards = "shards like model-00001-of-00002.safetensors"
        pickled = any(folder.glob("pytorch_model*.bin"))
        other = "; pytorch_model.bin is not read, save the model as safetensors" if pickled else ""
        raise ModelLoadError(f"{folder}: holds neither {WHOLE_FILE} nor {INDEX_FILE}, nor {shards}{other}")
    return files


def _string_items(path: Path, weight_map: object) -> list[tuple[str, str]]:
    if not isinstance(weight_map, Mapping) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelLoadError(f"{path}: weight_map must map tensor names to file names")
    return sorted(weight_map.items())


def _dtype(file: Path, name: str, dtype: str) -> np.dtype:
    if dtype not in _DTYPES:
        supported = ", ".join(name for name in _DTYPES if name != "U8")
        raise ModelLoadError(f"{file}: tensor {name!r} has dtype {dtype}, supported: {supported}")
    return _DTYPES[dtype]
