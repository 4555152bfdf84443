"""How `paged_attention` is divided on a GPU: a rule by device and shape, overridden by `tables`."""

from dataclasses import dataclass, replace
from math import ceil

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.device import Device
from pallas_kernels.formats import Format
from pallas_kernels.paged_attention.triton import tables
from pallas_kernels.sizes import next_power_of_two

# Most rows of a program's matrix product: query tokens x query heads of a KV head.
_MAX_ROWS = 128


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the work is divided. Results are right for all values, with key tiles of at least 16 on a GPU.

    Attributes:
      query_tile: most adjacent tokens of a sequence per program.
      key_tile: tokens of K and V per step, a power of two.
      num_warps, num_stages: Triton's options.
      programs: resident programs on the device. Query tiles are divided until there are as many.
      codes_a_word: one-byte codes that are read as parts of a word, and multiplied apart: 1 or 4.
      exact_float32: whether float32 products are computed directly, for GPUs whose matrix units take float32
        (CDNA) or that have none for it. Otherwise as three products of TF32 parts, equally accurate.
      ptx: whether words of codes are converted to 16-bit values in PTX, if the format has it. CUDA only.
    """

    query_tile: int
    key_tile: int
    num_warps: int
    num_stages: int
    programs: int
    codes_a_word: int = 4
    exact_float32: bool = False
    ptx: bool = False

    def __post_init__(self):
        for name in ("query_tile", "key_tile", "num_warps", "num_stages", "programs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.key_tile != next_power_of_two(self.key_tile):
            raise ValueError(f"key_tile={self.key_tile} must be a power of two")
        if self.codes_a_word not in (1, 4):
            raise ValueError(f"codes_a_word={self.codes_a_word} must be 1 or 4")

    def num_items(self, num_tiles: int, kv_heads: int, max_keys: int, *, prompts: bool) -> int:
        """Number of items to divide the query tiles into; `num_tiles` if a second launch would not pay."""
        short = max_keys <= 2 * self.key_tile
        # Long prompts occupy the device without division, and their partial results would be large.
        many = prompts and num_tiles * kv_heads >= 2 * self.programs
        return num_tiles if short or many else num_tiles + max(1, self.programs // kv_heads)

    def precision(self, *dtypes: DTypeLike) -> lax.Precision | lax.DotAlgorithmPreset:
        """Precision of the matrix products."""
        if all(jnp.dtype(dtype) != jnp.float32 for dtype in dtypes):
            return lax.Precision.DEFAULT
        return lax.Precision.HIGHEST if self.exact_float32 else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def choose(device: Device, **shape) -> Tuning:
    """The tuning of the rule, with the values of the tables.

    Args:
      device, shape: the arguments of `rule`.

    Raises:
      ValueError, OSError: for a table that cannot be read; see `tables.find`.
    """
    chosen, found = rule(device, **shape), tables.find(device.kind, tables.Shape.of(**shape)).given
    if "query_tile" in found:
        found["query_tile"] = min(
            found["query_tile"], next_power_of_two(ceil(shape["tokens"] / shape["seqs"]))
        )
    if "programs" in found:
        found["programs"] *= device.multiprocessors
    return replace(chosen, **found)


def rule(
    device: Device,
    *,
    tokens: int,
    seqs: int,
    group: int,
    head_dim: int,
    storage: Format,
    q_dtype: DTypeLike,
) -> Tuning:
    """A tuning by device and shape; all were checked not to spill registers.

    Args:
      device: the GPU.
      tokens, seqs: rows of `q` and sequences, static.
      group: query heads per KV head.
      head_dim, storage: of the pool.
      q_dtype: of the queries.
    """
    rdna = device.platform == "rocm" and not device.arch.startswith("gfx9")
    codes = storage.quantized
    # Of the operands: codes are first converted to q's dtype.
    itemsize = jnp.dtype(q_dtype if codes else storage.kernel_dtype).itemsize
    row_bytes = next_power_of_two(head_dim) * itemsize
    # Queries and outputs of the rows stay in registers. float32, which is multiplied in parts, needs more,
    # and so do codes with their values.
    max_rows = 32 if rdna else _MAX_ROWS
    max_rows = max(16, min(max_rows, _MAX_ROWS * 256 // row_bytes))
    if itemsize == 4 or (codes and row_bytes > 256):
        max_rows = max(16, max_rows // 2)
    max_rows = min(max_rows, storage.max_rows)
    run = next_power_of_two(ceil(tokens / seqs))
    query_tile = min(run, max(1, max_rows // next_power_of_two(group)))
    rows = next_power_of_two(query_tile * group)
    many_registers = rows > 32 or row_bytes > 512
    most_registers = rows * row_bytes > 64 * 256 or (codes and rows > 64)
    # A tile of K is 16 KB on CUDA: one or two are in flight while one is processed, and two programs fit.
    # With codes, which take half, four programs fit.
    key_tile = min(128, max(16, 16384 // row_bytes))
    programs = 4 * device.multiprocessors
    if rdna:
        # RDNA's matrix units need every operand twice: more tokens at a time would not fit the registers.
        num_warps = 8 if row_bytes > 128 or many_registers else 4
        tuning = Tuning(query_tile, 16, num_warps, 1, programs, codes_a_word=1, exact_float32=True)
        return storage.tuned(tuning, device, head_dim, row_bytes)
    if device.platform == "rocm":
        key_tile = min(key_tile, 32 if codes and many_registers else 64)
        if most_registers:
            key_tile = min(key_tile, 16 if codes or row_bytes > 256 else 32)
        num_warps = 8 if many_registers else 4
        tuning = Tuning(query_tile, key_tile, num_warps, 1, programs, codes_a_word=1, exact_float32=True)
        return storage.tuned(tuning, device, head_dim, row_bytes)
    if codes:
        key_tile = max(16, key_tile // 2) if itemsize == 4 else min(key_tile, 64)
    # With rows of 128 two-byte values, more stages of codes would halve the number of programs, which was a
    # tenth slower on an H100.
    num_stages, codes_a_word = (6 if codes and (itemsize == 4 or row_bytes < 256) else 4), 4
    small = not 90 <= int(device.arch[3:]) < 120
    if small:
        # Less shared memory (99 KB per program on consumer GPUs): half the tile, as many programs.
        key_tile, num_stages = max(16, key_tile // 2), 8 if codes else 5
        if itemsize == 4 and device.arch not in ("sm_80", "sm_87"):
            num_stages = 3
    elif most_registers:
        # Parts of words would take more registers. These matrix units read V from shared memory, which is
        # filled sixteen bytes at a time either way.
        codes_a_word = 1
    # With float16 queries and short rows the assembly would spill.
    assembled = codes and itemsize == 2 and (row_bytes >= 256 or jnp.dtype(q_dtype) != jnp.float16)
    num_warps = 8 if many_registers else 4
    tuning = Tuning(query_tile, key_tile, num_warps, num_stages, programs, codes_a_word, ptx=assembled)
    return storage.tuned(tuning, device, head_dim, row_bytes)


def choose_shared(device: Device, *, seqs: int, **shape) -> Tuning:
    """The tuning for shared prefixes: joint tiles of the queries of sixteen sequences.

    The partial results of so many rows are large, so there are only as many programs as multiprocessors.

    Args:
      device, seqs: as for `rule`.
      shape: the other arguments of `rule`.
    """
    return replace(rule(device, seqs=ceil(seqs / 16), **shape), programs=device.multiprocessors)


def choose_mass(device: Device, **shape) -> Tuning:
    """The tuning for `attention_mass`, whose inner loop is over queries: one tile of them is prefetched.

    Args:
      device, shape: the arguments of `rule`.
    """
    tuning = rule(device, **shape)
    # K stays in registers during the loop; float32 in parts.
    wide = tuning.precision(shape["q_dtype"], shape["storage"].kernel_dtype) != lax.Precision.DEFAULT
    return replace(tuning, num_stages=min(2, tuning.num_stages), num_warps=8 if wide else tuning.num_warps)


def lacks(device: Device, q: Array | jax.ShapeDtypeStruct, storage: Format) -> str | None:
    """What the kernel lacks for these queries and pool on this device, or None."""
    head_dim = q.shape[2]
    if device.platform == "rocm" and not device.arch.startswith("gfx9") and head_dim > 128:
        return f"registers for head_dim {head_dim} on {device.arch}: 128 is the most"
    if reason := storage.lacks_attention(device, head_dim, q.dtype):
        return reason
    if reason := storage.lacks(device, storage.row_size(head_dim)):
        return reason
    return None if q.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) else str(q.dtype)


def lacks_mass(device: Device, q: Array | jax.ShapeDtypeStruct, storage: Format) -> str | None:
    """As `lacks`, for `attention_mass`."""
    if reason := storage.lacks_mass():
        return reason
    head_dim, wide = q.shape[2], "float32" in (q.dtype, storage.kernel_dtype)
    if device.platform == "rocm" and not device.arch.startswith("gfx9") and wide and head_dim > 64:
        return f"registers for float32 of head_dim {head_dim} on {device.arch}: 64 is the most"
    return lacks(device, q, storage)
