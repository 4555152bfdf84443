"""What the device says it holds, beside what is known to be there. Import it by name."""

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
      in_use: what the device says is taken.
      weights, kv_pool, tables: of the arrays that were named.
      limit: what may be taken, where the device says so.
      source: "memory_stats", the allocator's own account, which has everything in it; or "live_arrays",
        the arrays that Python can reach, where the device keeps no account (a CPU).
    """

    in_use: int
    weights: int
    kv_pool: int
    tables: int
    limit: int | None
    source: str

    @property
    def other(self) -> int:
        """The rest: activations, scratch, other arrays. Below zero, the device holds less than was named."""
        return self.in_use - self.weights - self.kv_pool - self.tables

    def as_dict(self) -> dict[str, int | str | None]:
        """Every number by its name."""
        numbers = {name: getattr(self, name) for name in self.__slots__}
        return numbers | {"other": self.other}

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
    """Asks the device what it holds.

    Args:
      cache: the cache; its shapes are enough, so a donated one will do.
      weights: a pytree of arrays that are the model.
      device: which. Default: the first of this process.

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
    """The most that a device held while a block of code ran.

        with PeakMemory() as memory:
            for _ in range(10):
                cache, tokens = step(params, cache, tokens)
                memory.sample()
        memory.peak, memory.is_exact

    The peak is exact where the allocator keeps one and it rose in the block. Otherwise it is the largest
    of the samples, which are taken at the begin, at the end and where `sample` is called: a lower bound,
    since what a compiled program takes while it runs falls between them. On a CPU it is always that.

    Attributes:
      device: which. Default: the first of this process.
      peak: bytes.
      is_exact: whether no moment of the block had more.
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
        """Bytes in use now, which the peak takes note of."""
        in_use = device_memory(device=self.device).in_use
        self.peak = max(self.peak, in_use)
        return in_use

    def _allocator_peak(self) -> int | None:
        return _account(self.device).get("peak_bytes_in_use")


def _account(device: Device) -> dict[str, int]:
    """The allocator's, empty where it keeps none."""
    return device.memory_stats() or {}


def _live_bytes(device: Device) -> int:
    """Of every array that has not been deleted; one buffer under two names counts once."""
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
    """Of the shard that lies there."""
    if device not in array.sharding.device_set:
        return 0
    if not array.size:
        return 0
    shard = prod(array.sharding.shard_shape(array.shape))
    return array.nbytes * shard // array.size
