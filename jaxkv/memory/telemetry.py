"""Metrics of caches in use, for Prometheus and for callbacks.

Names follow vLLM's (`vllm:kv_cache_usage_perc` is `jaxkv_kv_cache_usage_perc`) and Prometheus' conventions.
Each metric has the label `cache`, the name given to `observe`.

    gauges     jaxkv_kv_cache_usage_perc      share of the pool's pages in use, 0 to 1
               jaxkv_pages_used               pages in use; a shared one counts once
               jaxkv_pages_free
               jaxkv_pages_shared             pages with more than one owner
               jaxkv_tokens                   of all sequences; a shared one counts for each
               jaxkv_active_sequences
               jaxkv_kv_cache_used_bytes
               jaxkv_fragmentation_ratio      share of token slots in owned pages without a token, 0 to 1
    counters   jaxkv_page_allocations_total, jaxkv_page_deallocations_total
               jaxkv_refused_allocations_total
               jaxkv_copy_on_write_copies_total
               jaxkv_compactions_total, jaxkv_pages_moved_total
               jaxkv_evictions_total, jaxkv_evicted_tokens_total
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from jaxkv.arguments import integer
from jaxkv.extras import needs_extra
from jaxkv.memory.profile import MemoryProfile, memory_profile
from jaxkv.state import AllocationStats, KVCache

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

GAUGES = {
    "jaxkv_kv_cache_usage_perc": ("usage", "Share of the pool's pages in use, 0 to 1."),
    "jaxkv_pages_used": ("physical_pages", "Pages in use; a shared one counts once."),
    "jaxkv_pages_free": ("free_pages", "Pages that nobody owns."),
    "jaxkv_pages_reclaimable": ("reclaimable_pages", "Pages kept for prompts that begin alike alone."),
    "jaxkv_pages_shared": ("shared_pages", "Pages with more than one owner."),
    "jaxkv_tokens": ("tokens", "Tokens of all sequences; a shared one counts for each."),
    "jaxkv_active_sequences": ("active_seqs", "Sequences with tokens in the cache."),
    "jaxkv_kv_cache_used_bytes": ("used_bytes", "Bytes of the pages in use."),
    "jaxkv_fragmentation_ratio": ("fragmentation", "Share of owned token slots without a token, 0 to 1."),
}
# The client adds `_total` to these names.
COUNTERS = {
    "jaxkv_page_allocations": ("total_allocations", "Pages taken into use, copies included."),
    "jaxkv_page_deallocations": ("total_deallocations", "Pages that their last sequence gave back."),
    "jaxkv_refused_allocations": ("refused_allocations", "Entries of allocate that were refused."),
    "jaxkv_copy_on_write_copies": ("copy_on_write_copies", "Shared tail pages copied before a write."),
    "jaxkv_compactions": ("compactions", "Times the pool was compacted."),
    "jaxkv_pages_moved": ("pages_moved", "Pages moved by compaction."),
    "jaxkv_evictions": ("evictions", "Times that a policy dropped tokens of a sequence."),
    "jaxkv_evicted_tokens": ("evicted_tokens", "Tokens that policies dropped."),
    "jaxkv_prefix_queries": ("prefix_queries", "Prompts looked up by match_prefix."),
    "jaxkv_prefix_tokens_asked": ("prefix_tokens_asked", "Tokens of the prompts looked up."),
    "jaxkv_prefix_tokens_matched": ("prefix_tokens_matched", "Tokens of them found in the cache."),
    "jaxkv_prefix_pages_recorded": ("prefix_pages_recorded", "Pages made findable by record_prefix."),
    "jaxkv_prefix_pages_reclaimed": ("prefix_pages_reclaimed", "Recorded pages taken for other tokens."),
}
# Counters that never decrease.
_GROWING = np.array([name != "current_pages" for name in AllocationStats.names()])
# Most profiles in flight; with more, `observe` waits for the oldest.
_MOST_PENDING = 8

_profile = jax.jit(memory_profile)


class _Fetch(NamedTuple):
    cache: str
    profile: MemoryProfile


class Telemetry:
    """Publishes profiles of caches without delaying the decode loop.

    `observe` starts a transfer from the device and returns; a later call publishes the profile.

        telemetry = Telemetry(every=16)
        telemetry.serve(9400)
        while running:
            cache, tokens = step(params, cache, tokens)
            telemetry.observe(cache)
        telemetry.flush()

    Published counters are sums of increases, so they never decrease. The device's counters saturate at the
    largest int32 and start at zero with a new cache. A cache whose counters are lower than the last ones
    observed under its name counts as new; otherwise call `forget` before observing a new cache.

    Attributes:
      registry: the registry that Prometheus reads.
    """

    registry: "CollectorRegistry"

    def __init__(
        self,
        *,
        every: int = 1,
        registry: "CollectorRegistry | None" = None,
        on_profile: Callable[[str, MemoryProfile], None] | None = None,
    ):
        """Makes the metrics.

        Args:
          every: publish every n-th call of `observe` for a cache.
          registry: where to add the metrics. Default: a new one, so that a process can have several.
          on_profile: called on the host with a cache's name and profile when it is published.

        Raises:
          ValueError: for a bad `every`, or a registry that has these metrics already.
          ModuleNotFoundError: without prometheus-client.
        """
        with needs_extra():
            from prometheus_client import CollectorRegistry, Counter, Gauge

        every = integer("every", every)
        self.registry = CollectorRegistry() if registry is None else registry
        self._every, self._on_profile = every, on_profile
        self._gauges = {
            field: Gauge(name, text, ["cache"], registry=self.registry)
            for name, (field, text) in GAUGES.items()
        }
        self._counters = {
            field: Counter(name, text, ["cache"], registry=self.registry)
            for name, (field, text) in COUNTERS.items()
        }
        self._calls: dict[str, int] = {}
        self._seen: dict[str, np.ndarray] = {}
        self._pending: deque[_Fetch] = deque()

    def observe(self, cache: KVCache, *, name: str = "default") -> None:
        """Starts to fetch a profile of the cache, and publishes earlier profiles that have arrived.

        Args:
          cache: the cache; it may be donated afterwards.
          name: of the cache, the label of its metrics.
        """
        calls = self._calls.get(name, 0)
        self._calls[name] = calls + 1
        if calls % self._every == 0:
            profile = _profile(cache)
            for array in jax.tree.leaves(profile):
                array.copy_to_host_async()
            self._pending.append(_Fetch(name, profile))
        while self._pending and (len(self._pending) > _MOST_PENDING or _is_ready(self._pending[0].profile)):
            self._publish(*self._pending.popleft())

    def flush(self) -> None:
        """Waits for all profiles in flight, and publishes them."""
        while self._pending:
            self._publish(*self._pending.popleft())

    def forget(self, name: str = "default") -> None:
        """Declares the next cache observed under a name as new, with counters that start at zero."""
        self._seen.pop(name, None)

    def serve(self, port: int, *, host: str = "127.0.0.1") -> "Server":
        """Serves the metrics at `http://host:port/metrics` from a thread, until the server is closed.

        Args:
          port: 0 takes any free port.
          host: address to listen on; "0.0.0.0" allows other machines.

        Raises:
          ValueError: for a port out of range or in use, or an address that is not this machine's.
        """
        return Server(self.registry, port, host)

    def _publish(self, name: str, profile: MemoryProfile) -> None:
        profile = jax.device_get(profile)
        for field, gauge in self._gauges.items():
            gauge.labels(cache=name).set(getattr(profile, field))
        counters = np.asarray(profile.stats.counters, np.int64)
        before = self._seen.get(name, np.zeros_like(counters))
        if np.any((counters < before)[_GROWING]):
            before = np.zeros_like(counters)
        self._seen[name] = counters
        grown = dict(zip(AllocationStats.names(), (counters - before).tolist(), strict=True))
        for field, counter in self._counters.items():
            counter.labels(cache=name).inc(grown[field])
        if self._on_profile is not None:
            self._on_profile(name, profile)


class Server:
    """Metrics over HTTP; a context manager.

    Attributes:
      url: address of the metrics.
    """

    def __init__(self, registry: "CollectorRegistry", port: int, host: str = "127.0.0.1"):
        with needs_extra():
            from prometheus_client import start_http_server

        if type(port) is not int or not 0 <= port < 2**16:
            raise ValueError(f"port={port!r} must be from 0 to {2**16 - 1}")
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ValueError(
                f"metrics cannot be served at {host}:{port}: {error.strerror or error}"
            ) from None
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops serving and releases the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _is_ready(profile: MemoryProfile) -> bool:
    return all(array.is_ready() for array in jax.tree.leaves(profile))
