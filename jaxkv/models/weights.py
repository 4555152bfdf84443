"""Builds a model from the tensors of a checkpoint of any format.

A format provides a `TensorSource`. This module determines which tensors a model must have, joins those that
the model stores as one matrix, and reads one tensor at a time, so memory holds the model and one matrix more.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxkv.errors import ModelLoadError
from jaxkv.models.config import ModelConfig
from jaxkv.models.decoder import Decoder, parameter_dtype
from jaxkv.models.tensor_names import TensorNames

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the total."""


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


def build_model(
    config: ModelConfig,
    source: TensorSource,
    names: TensorNames,
    *,
    dtype: DTypeLike,
    ignored: Callable[[str], bool],
    progress: Progress | None = None,
) -> Decoder:
    """Reads a whole checkpoint into a model.

    Args:
      config: the model's sizes.
      source: the checkpoint.
      names: its tensor names.
      dtype: of the model's matrices.
      ignored: whether to ignore a tensor that the model does not need.
      progress: called after each tensor; see `Progress`.

    Raises:
      ModelLoadError: for a missing, unexpected, misshapen or non-finite tensor.
    """
    wanted = expected_shapes(config, names)
    _check_names(source, wanted, ignored)
    total, done = sum(source.num_bytes(name) for name in wanted), 0

    def parameter(name: str, shape: tuple[int, ...]) -> jax.Array:
        nonlocal done
        whole, row = np.empty(shape, parameter_dtype(shape, dtype)), 0
        for part in names.parts(name):
            rows = wanted[part][0]
            _copy(source, part, whole[row : row + rows])
            row += rows
            done += source.num_bytes(part)
            if progress is not None:
                progress(done, total)
        if names.norm_offset and name.endswith("norm"):
            whole += names.norm_offset
        return jnp.asarray(whole)

    return Decoder(config, parameter)


def expected_shapes(config: ModelConfig, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a checkpoint of this config must have."""
    q, kv, ffn = config.q_features, config.kv_features, config.intermediate_size
    rows = {"qkv": (q, kv, kv), "qkv_bias": (q, kv, kv), "gate_up": (ffn, ffn)}
    wanted: dict[str, tuple[int, ...]] = {}

    def note(parameter: str, shape: tuple[int, ...]) -> jax.Array:
        parts = names.parts(parameter)
        heights = rows[parameter.rpartition(".")[2]] if len(parts) > 1 else shape[:1]
        for name, height in zip(parts, heights, strict=True):
            wanted[name] = (height, *shape[1:])
        return jax.ShapeDtypeStruct(shape, jnp.float32)  # type: ignore[return-value]

    Decoder(config, note)
    return wanted


def _check_names(
    source: TensorSource, wanted: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]
) -> None:
    for name, shape in wanted.items():
        found = source.shapes.get(name)
        if found is None:
            raise ModelLoadError(f"{source.path}: tensor {name!r} is missing")
        if found != shape:
            raise ModelLoadError(f"{source.path}: tensor {name!r} has shape {found}, expected {shape}")
    for name in source.shapes:
        if name not in wanted and not ignored(name):
            raise ModelLoadError(f"{source.path}: tensor {name!r} is not part of this model")


def _copy(source: TensorSource, name: str, into: np.ndarray) -> None:
    """Reads a tensor into its rows of a parameter, in the parameter's dtype; refuses non-finite values."""
    tensor = source.read(name)
    with np.errstate(over="ignore", invalid="ignore"):
        into[...] = tensor
        # A finite sum means finite terms; otherwise the terms are checked.
        total = np.sum(into, dtype=np.float32)
    if np.isfinite(total) or np.all(np.isfinite(into)):
        return
    damaged = not np.all(np.isfinite(tensor))
    what = "NaN or infinite values" if damaged else f"values too large for {into.dtype}"
    raise ModelLoadError(f"{source.path}: tensor {name!r} holds {what}")
