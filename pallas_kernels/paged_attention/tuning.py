"""How `paged_attention` is cut up on a GPU: a small table by device and shape."""

from dataclasses import dataclass
from math import ceil

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.launch import next_power_of_two

# Rows of a matrix product that a program takes, at most: query tokens x query heads of a KV head.
_MAX_ROWS = 128


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the work is cut up. Any values are right; some are fast.

    Attributes:
      key_tile: tokens of K and V that a program works on at a time, a power of two.
      num_warps, num_stages: as Triton means them; stages are tiles in flight.
      programs: to be resident on the device at once. Query tiles are cut until there are so many.
      exact_float32: float32 products by fused multiply-add, where matrix units would take three
        products of TF32 parts. ROCm's matrix units take float32 as it is, and need it.
    """

    key_tile: int
    num_warps: int
    num_stages: int
    programs: int
    exact_float32: bool = False

    def query_tile(self, tokens: int, num_seqs: int, group: int) -> int:
        """Rows of `q` that a program takes at most: the average run, within the limit for `group` heads."""
        run = next_power_of_two(ceil(tokens / num_seqs))
        return min(run, max(1, _MAX_ROWS // next_power_of_two(group)))

    def num_items(self, num_tiles: int, kv_heads: int, max_keys: int) -> int:
        """Items to cut the query tiles into: `num_tiles` where a second launch would not pay."""
        if max_keys <= 2 * self.key_tile:
            return num_tiles
        return max(2 * num_tiles, self.programs // kv_heads)

    def precision(self, *dtypes):
        """Of the matrix products."""
        if any(jnp.dtype(dtype) == jnp.float32 for dtype in dtypes):
            return lax.Precision.HIGHEST if self.exact_float32 else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return lax.Precision.DEFAULT


@dataclass(frozen=True, slots=True)
class Device:
    """What of a GPU the choice depends on.

    Attributes:
      platform: "cuda" or "rocm".
      multiprocessors: or compute units.
    """

    platform: str
    multiprocessors: int

    @classmethod
    def current(cls) -> "Device":
        """The default device; where that is no GPU, an H100."""
        device = jax.devices()[0]
        if device.platform not in ("gpu", "cuda", "rocm"):
            return cls("cuda", 132)
        rocm = "rocm" in getattr(device.client, "platform_version", "").lower()
        return cls("rocm" if rocm else "cuda", getattr(device, "core_count", 0) or 132)


def choose(device: Device, head_dim: int, dtype) -> Tuning:
    """The table. A key tile and its stages fill shared memory so that several programs are resident."""
    row_bytes = next_power_of_two(head_dim) * jnp.dtype(dtype).itemsize
    key_tile = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    if device.platform == "rocm":
        return Tuning(key_tile, 4, 1, 4 * device.multiprocessors, exact_float32=True)
    return Tuning(key_tile, 4, 4, 4 * device.multiprocessors)
