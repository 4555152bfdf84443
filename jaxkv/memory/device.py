"""Memory in use on a device, by purpose. Import it explicitly."""

from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import jax

from jaxkv.memory.profile import align
from jaxkv.state import KVCache
from jaxkv.units import common_unit, format_bytes

# `jax.Device` is a variable to a type checker.
Device: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on one device at one moment, by purpose.

    Attributes:
      in_use: bytes in use, as the device reports.
      weights, kv_pool, tables: bytes of the arrays given to `device_memory`.
      limit: bytes available to the process, if the device reports it.
      source: "memory_stats", the allocator's statistics, which include everything; or "live_arrays", the
        arrays that Python can reach, where the device has no statistics (a CPU).
    """

    in_use: int
    weights: int
    kv_pool: int
    tables: int
    limit: int | None
    source: str

    @property
    def other(self) -> int:
        """The rest: activations, scratch, other arrays. Negative if the device holds less than was given."""
        return self.in_use - self.weights - self.kv_pool - self.tables

    def as_dict(self) -> dict[str, int | str | None]:
        """Every attribute by name."""
        return {name: getattr(self, name) for name in (*self.__slots__, "other")}

    def report(self) -> str:
        """The bytes by purpose, in aligned columns."""
        parts = {name: getattr(self, name) for name in ("weights", "kv_pool", "tables", "other")}
        unit = common_unit([self.in_use, *parts.values()])
        limit = "" if self.limit is None else f" of {format_bytes(self.limit, unit)}"
        rows = [("device memory", format_bytes(self.in_use, unit), f"in use{limit}, by {self.source}")]
        for name, part in parts.items():
            share = part / self.in_use if self.in_use else 0.0
            rows.append((f"  {name.replace('_', ' ')}", format_bytes(part, unit), f"{share:.1%}"))
        return align(rows)


def device_memory(
    cache: KVCache | None = None, *, weights: Any = None, device: Device | None = None
) -> DeviceMemory:
    """Memory in use on a device, by purpose.

    Args:
      cache: the cache; only shapes are read, so it may have been donated.
      weights: the model, a pytree of arrays.
      device: the device. Default: the first of this process.

    Returns:
      Bytes by purpose.

    Example:
      >>> import jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4)
      >>> cache = jaxkv.init(config)
      >>> device_memory(cache).kv_pool == 4 * config.page_bytes
      True
    """
    device = jax.local_devices()[0] if device is None else device
    stats = _account(device)
    in_use = stats.get("bytes_in_use")
    return DeviceMemory(
        in_use=_live_bytes(device) if in_use is None else in_use,
        weights=_tree_bytes(weights, device),
        kv_pool=_tree_bytes(cache and cache.pool, device),
        tables=_tree_bytes(cache and (cache.table, cache.stats, cache.policy), device),
        limit=stats.get("bytes_limit"),
        source="live_arrays" if in_use is None else "memory_stats",
    )


@dataclass(slots=True)
class PeakMemory:
    """The peak of memory in use while a block of code ran.

        with PeakMemory() as memory:
            for _ in range(10):
                cache, tokens = step(params, cache, tokens)
                memory.sample()
        memory.peak, memory.is_exact

    The peak is exact if the allocator records one and it rose in the block. Otherwise, and always on a CPU,
    it is the largest sample: at the beginning, at the end and at each call of `sample`. That is a lower
    bound, since temporary memory of a running program falls between samples.

    Attributes:
      device: the device. Default: the first of this process.
      peak: bytes.
      is_exact: whether the peak is exact, not a lower bound.
    """

    device: Device = field(default_factory=lambda: jax.local_devices()[0])
    peak: int = 0
    is_exact: bool = False
    _peak_before: int | None = None

    def __enter__(self) -> "PeakMemory":
        self.peak, self.is_exact = 0, False
        self._peak_before = self._allocator_peak()
        self.sample()
        return self

    def __exit__(self, *exception: object) -> None:
        self.sample()
        peak = self._allocator_peak()
        if peak is not None and self._peak_before is not None and peak > self._peak_before:
            self.peak, self.is_exact = peak, True

    def sample(self) -> int:
        """Bytes in use now; raises the peak if they exceed it."""
        in_use = device_memory(device=self.device).in_use
        self.peak = max(self.peak, in_use)
        return in_use

    def _allocator_peak(self) -> int | None:
        return _account(self.device).get("peak_bytes_in_use")


def _account(device: Device) -> dict[str, int]:
    """The allocator's statistics; empty if it has none."""
    return device.memory_stats() or {}


def _live_bytes(device: Device) -> int:
    """Bytes of all arrays that are not deleted; arrays that share a buffer count once."""
    buffers: dict[object, int] = {}
    for array in jax.live_arrays(device.platform):
        if array.is_deleted() or device not in array.sharding.device_set:
            continue
        alone = len(array.sharding.device_set) == 1
        buffers[array.unsafe_buffer_pointer() if alone else id(array)] = _bytes_on(array, device)
    return sum(buffers.values())


def _tree_bytes(tree: Any, device: Device) -> int:
    return sum(_bytes_on(leaf, device) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


def _bytes_on(array: jax.Array, device: Device) -> int:
    """Bytes of the array's shard on the device."""
    if device not in array.sharding.device_set:
        return 0
    if not array.size:
        return 0
    shard = prod(array.sharding.shard_shape(array.shape))
    return array.nbytes * shard // array.size
