"""Builds a model from the tensors of a checkpoint of any format.

A format provides a `TensorSource`. This module determines which tensors a model must have, joins those that
the model stores as one matrix, and reads one tensor at a time, so memory holds the model and one matrix more.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxkv.errors import ModelLoadError
from jaxkv.models.config import ModelConfig
from jaxkv.models.decoder import Decoder, parameter_dtype
from jaxkv.models.tensor_names import TensorNames
from jaxkv.models.tensor_source import TensorSource

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the total."""


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
    _check_counts(config, source, names)
    wanted = expected_shapes(config, names)
    _check_names(source, wanted, ignored)
    total, done = sum(source.num_bytes(name) for name in wanted), 0

    def parameter(name: str, shape: tuple[int, ...]) -> jax.Array:
        nonlocal done
        whole = np.empty(shape, parameter_dtype(shape, dtype))
        for part in pieces(config, names, name, shape):
            _copy(source, part.name, as_stored(name, whole)[part.rows])
            done += source.num_bytes(part.name)
            if progress is not None:
                progress(done, total)
        if names.norm_offset and name.endswith("norm"):
            whole += names.norm_offset
        return jnp.asarray(whole)

    return Decoder(config, parameter)


class Piece(NamedTuple):
    """A tensor of a checkpoint, and where it lies in a parameter of the model; see `as_stored`."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[int | slice, ...]


def pieces(config: ModelConfig, names: TensorNames, parameter: str, shape: tuple[int, ...]) -> list[Piece]:
    """The tensors that a parameter of `Decoder`, such as `blocks.3.qkv`, is joined from."""
    last = parameter.rpartition(".")[2]
    experts = _is_of_experts(last)
    if experts and len(shape) == 3:
        shape = shape[0], shape[2], shape[1]
    axis, parts, start = int(experts), names.parts(parameter), 0
    heights = _heights(config, last) if len(parts) > 1 else (shape[axis],)
    found: list[Piece] = []
    for name, height in zip(parts, heights, strict=True):
        rows, size = slice(start, start + height), (height, *shape[axis + 1 :])
        start += height
        if not experts:
            found.append(Piece(name, size, (rows,)))
        elif "{expert}" in name:
            found += [Piece(name.format(expert=one), size, (one, rows)) for one in range(shape[0])]
        else:
            found.append(Piece(name, (shape[0], *size), (slice(None), rows)))
    return found


def as_stored(parameter: str, array: np.ndarray) -> np.ndarray:
    """A view of a parameter in the order of checkpoints, where a matrix has its out features first."""
    stacked = _is_of_experts(parameter.rpartition(".")[2]) and array.ndim == 3
    return array.swapaxes(1, 2) if stacked else array


def expected_shapes(config: ModelConfig, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a checkpoint of this config must have."""
    wanted: dict[str, tuple[int, ...]] = {}

    def note(parameter: str, shape: tuple[int, ...]) -> jax.Array:
        wanted.update((piece.name, piece.shape) for piece in pieces(config, names, parameter, shape))
        return jax.ShapeDtypeStruct(shape, jnp.float32)  # type: ignore[return-value]

    Decoder(config, note)
    return wanted


def _is_of_experts(parameter: str) -> bool:
    return parameter.startswith("expert_")


def _heights(config: ModelConfig, parameter: str) -> tuple[int, ...]:
    """Rows of each tensor of a parameter that is joined from several."""
    q, kv, experts = config.q_features, config.kv_features, config.experts
    heights = {"qkv": (q, kv, kv), "gate_up": (config.intermediate_size,) * 2}
    if experts is not None:
        heights["expert_gate_up"] = (experts.intermediate_size,) * 2
        heights["shared_gate_up"] = (experts.shared_size or 0,) * 2
    return heights[parameter.removesuffix("_bias")]


def _check_counts(config: ModelConfig, source: TensorSource, names: TensorNames) -> None:
    """Refuses counts that would ask for more tensors than the checkpoint has, before millions are listed."""
    counts = {"layers": config.num_layers}
    if config.experts is not None and "{expert}" in names.expert_down:
        layers = config.num_layers - len(config.dense_layers)
        counts["experts of all layers"] = layers * config.experts.count
    for what, count in counts.items():
        if count > len(source.shapes):
            raise ModelLoadError(f"{source.path}: has {len(source.shapes)} tensors for {count} {what}")


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
    if tensor.dtype.kind in "iu":
        raise ModelLoadError(f"{source.path}: tensor {name!r} holds {tensor.dtype}, not weights")
    with np.errstate(over="ignore", invalid="ignore"):
        into[...] = tensor
        # A finite sum means finite terms; otherwise the terms are checked.
        total = np.sum(into, dtype=np.float32)
    if np.isfinite(total) or np.all(np.isfinite(into)):
        return
    damaged = not np.all(np.isfinite(tensor))
    what = "NaN or infinite values" if damaged else f"values too large for {into.dtype}"
    raise ModelLoadError(f"{source.path}: tensor {name!r} holds {what}")
