"""What a format of checkpoints provides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """A checkpoint on disk.

    Attributes:
      path: the file or folder, for messages.
      shapes: of every tensor, outermost dimension first.
    """

    path: Path

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray:
        """One tensor as a float array; raises `ModelLoadError` if it is damaged."""
        ...

    def num_bytes(self, name: str) -> int:
        """Bytes of one tensor in the file."""
        ...
