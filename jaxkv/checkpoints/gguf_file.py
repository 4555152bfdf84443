"""Reads a GGUF file: metadata by name, tensors dequantized one by one."""

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxkv.checkpoints.hf_folder import one_line, shown
from jaxkv.errors import ModelLoadError

# Gemma's vocabulary, the largest published one, has 514,906 merges.
_MOST_ELEMENTS = 2**22
_ARRAY = int(gguf.GGUFValueType.ARRAY)  # of a plain integer, which is compared faster


class GGUFFile:
    """The metadata and the tensors of one GGUF file.

    Attributes:
      path: of the file.
      shapes: of every tensor, outermost dimension first.

    Raises:
      ModelLoadError: if it is not a GGUF file, or is truncated.
    """

    def __init__(self, path: Path):
        self.path = path
        reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self._fields = reader.fields

    def get(self, name: str, default: Any = None) -> Any:
        """One metadata field, or `default` if the file has none."""
        field = self._fields.get(name)
        if field is None:
            return default
        try:
            return field.contents()
        except Exception as error:
            raise ModelLoadError(f"{self.path}: field {name!r} is damaged: {one_line(error)}") from None

    def number(self, name: str, kind: type[int] | type[float], default: float | None = None) -> Any:
        """One metadata field that must be an integer or a number.

        Args:
          name: the field.
          kind: `int` or `float`.
          default: returned if the file has no such field; None makes the field required.
        """
        value = self.get(name, default)
        if value is None:
            raise ModelLoadError(f"{self.path}: metadata has no field {name!r}")
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]  # one value per layer, all equal
        if not isinstance(value, kind) or isinstance(value, bool):
            expected = "an integer" if kind is int else "a number"
            raise ModelLoadError(f"{self.path}: field {name!r} must be {expected}, not {shown(value)}")
        return value

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantized: float32, or the file's float16 or float64."""
        tensor = self._tensors[name]
        try:
            if tensor.tensor_type.name in ("F32", "F16", "F64"):
                return tensor.data
            with np.errstate(all="ignore"):  # a damaged scale: its values are checked later
                return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ModelLoadError(
                f"{self.path}: tensor {name!r} is of type {tensor.tensor_type.name}, "
                "which cannot be dequantized"
            ) from None

    def num_bytes(self, name: str) -> int:
        """Bytes of one tensor in the file."""
        return int(self._tensors[name].n_bytes)


class _Reader(gguf.GGUFReader):
    """Reads a header three times faster: slicing a plain array costs less than slicing a memory map.

    It also refuses to read beyond the end of the file, where the package returns fewer elements, and lists
    longer than the file or than any that is published, which the package reads one element at a time.
    """

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
        kind, data = np.dtype(dtype), self._data
        start = int(offset)
        end = start + kind.itemsize * int(count)
        if end > data.size:
            raise ValueError(f"it ends at byte {data.size}, before byte {end}")
        order = override_order or self.byte_order
        return data[start:end].view(kind if order == "I" else kind.newbyteorder(order))

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        if int(raw_type) == _ARRAY:
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            if count > min(_MOST_ELEMENTS, len(self._data) - int(orig_offs)):
                raise ValueError(f"a list of {shown(count)} elements at byte {orig_offs} is too long")
        return super()._get_field_parts(orig_offs, raw_type)


def _check_layout(reader: gguf.GGUFReader) -> None:
    """Raises `ValueError` unless tensors follow one another in the file, as llama.cpp requires too."""
    start = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != start:
            raise ValueError(
                f"tensor {shown(tensor.name)} is at byte {tensor.data_offset}, expected {start}, after the "
                "tensor before it"
            )
        start += -(-int(tensor.n_bytes) // int(reader.alignment)) * int(reader.alignment)


def _open(path: Path) -> gguf.GGUFReader:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise ModelLoadError(f"{path}: is not a GGUF file")
    try:
        # Sizes of a damaged header overflow before the reader notices that the file is too short.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)
            reader = _Reader(path)
            _check_layout(reader)
            return reader
    except Exception as error:
        # The reader raises errors of any kind for a damaged file, with whatever text the file holds.
        raise ModelLoadError(f"{path}: is truncated or damaged: {one_line(error)}") from None
