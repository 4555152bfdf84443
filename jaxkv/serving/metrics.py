"""Metrics of a server, for Prometheus.

Names follow vLLM's (`vllm:num_requests_running` is `jaxkv_num_requests_running`), where a request of several
samples counts once for each.

    gauges      jaxkv_num_requests_running
                jaxkv_num_requests_waiting             in the request table, for slots or pages
    counters    jaxkv_num_preemptions_total
                jaxkv_generation_tokens_total
                jaxkv_prefix_cache_hits_total          tokens found in the prefix cache at admission
                jaxkv_spec_decode_num_draft_tokens_total, jaxkv_spec_decode_num_accepted_tokens_total
                jaxkv_request_success_total            label `finished_reason`: stop, length, ...
                jaxkv_requests_refused_total
    histograms  jaxkv_time_to_first_token_seconds
                jaxkv_time_per_output_token_seconds    of the tokens after the first event of a sample
                jaxkv_e2e_request_latency_seconds

Tokens reach the host a block of steps at a time (`serve(block=)`), and times are those of the host: the first
token is seen with the block that holds it, and the tokens of an event share the time since the event before.
Metrics of the cache itself: `jaxkv.telemetry`, whose registry this one may share.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxkv.decode import Finish
from jaxkv.extras import needs_extra
from jaxkv.memory.telemetry import Server
from jaxkv.serving.hosting import Event
from jaxkv.serving.state import Phase, ServingState, ServingStats

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

GAUGES = {
    "jaxkv_num_requests_running": (Phase.RUNNING, "Samples that have a slot."),
    "jaxkv_num_requests_waiting": (
        Phase.WAITING,
        "Samples in the request table that wait.",
    ),
}
# Counters of `ServingStats`. The client adds `_total` to these names.
COUNTERS = {
    "jaxkv_num_preemptions": ("preemptions", "Times that a sample lost its slot to one that ranks above it."),
    "jaxkv_generation_tokens": ("new_tokens", "Tokens generated."),
    "jaxkv_prefix_cache_hits": ("matched_tokens", "Tokens found in the prefix cache at admission."),
    "jaxkv_spec_decode_num_draft_tokens": ("proposed_tokens", "Tokens that speculation proposed."),
    "jaxkv_spec_decode_num_accepted_tokens": ("accepted_tokens", "Proposed tokens that the model chose."),
}
# Upper bounds in seconds, vLLM's.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160),
    *(640, 2560),
)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class ServingMetrics:
    """Publishes what a server does.

        metrics = ServingMetrics()
        with metrics.serve(9400):
            for event in serve(model, config, requests, on_state=metrics.observe):
                metrics.see(event)

    Counters are sums of increases, so they never fall. A state of fewer steps than the last one counts as a
    new server's.

    Attributes:
      registry: the registry that Prometheus reads.

    Example:
      >>> metrics = ServingMetrics()
      >>> metrics.see(Event(id=0, tokens=(5,), seconds=0.25))
      >>> metrics.registry.get_sample_value("jaxkv_time_to_first_token_seconds_sum")
      0.25
    """

    registry: "CollectorRegistry"

    def __init__(self, *, registry: "CollectorRegistry | None" = None):
        """Makes the metrics.

        Args:
          registry: where to add them, such as that of a `Telemetry`. Default: a new one.

        Raises:
          ValueError: for a registry that has these metrics already.
          ModuleNotFoundError: without prometheus-client.
        """
        with needs_extra():
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry() if registry is None else registry
        into: Any = dict(registry=self.registry)
        self._gauges = {phase: Gauge(name, text, **into) for name, (phase, text) in GAUGES.items()}
        self._counters = {of: Counter(name, text, **into) for name, (of, text) in COUNTERS.items()}
        text = "Samples that ended, by the reason."
        self._finished = Counter("jaxkv_request_success", text, ["finished_reason"], **into)
        self._refused = Counter("jaxkv_requests_refused", "Requests that can never be served.", **into)

        def times(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"jaxkv_{name}_seconds", text, buckets=buckets, **into)

        self._first = times("time_to_first_token", "From a request to a sample's first token.", _FIRST_TOKEN)
        self._each = times("time_per_output_token", "Between two tokens of a sample.", _PER_TOKEN)
        self._whole = times("e2e_request_latency", "From a request to a sample's end.", _WHOLE)
        self._seen = np.zeros(len(ServingStats.names()), np.int64)
        # Seconds at the newest event of each sample that has tokens.
        self._last: dict[tuple[int, int], float] = {}

    def observe(self, state: ServingState) -> None:
        """Publishes the state's counters and how many samples run and wait; to be given as `on_state`.

        Args:
          state: the server after a block; it may be donated afterwards.
        """
        phase, counters = jax.device_get((state.requests.phase, state.stats.counters))
        for of, gauge in self._gauges.items():
            gauge.set(int(np.sum(phase == of)))
        counters = np.array(counters, np.int64)
        # The device's counters are int32 and wrap around.
        grown = (counters - self._seen) % 2**32
        if grown[ServingStats.names().index("steps")] >= 2**31:  # fewer steps: a new server
            grown = counters % 2**32
        self._seen = counters
        amounts = dict(zip(ServingStats.names(), grown.tolist(), strict=True))
        for of, counter in self._counters.items():
            counter.inc(amounts[of])

    def see(self, event: Event) -> None:
        """Counts an event; to be called with each that `serve` yields.

        Args:
          event: its `seconds` are from the request on.
        """
        if event.error is not None:
            self._refused.inc()
            return
        key, count = (event.id, event.sample), len(event.tokens)
        if count and key not in self._last:
            self._first.observe(event.seconds)
        elif count:
            for _ in range(count):
                self._each.observe((event.seconds - self._last[key]) / count)
        if count:
            self._last[key] = event.seconds
        if event.finish != Finish.RUNNING:
            self._last.pop(key, None)
            self._finished.labels(finished_reason=event.finish.name.lower()).inc()
            self._whole.observe(event.seconds)

    def serve(self, port: int, *, host: str = "127.0.0.1") -> Server:
        """Serves the registry at `http://host:port/metrics` from a thread, until the server is closed.

        Args:
          port: 0 takes any free port.
          host: address to listen on; "0.0.0.0" allows other machines.

        Raises:
          ValueError: for a port out of range or in use, or an address that is not this machine's.
        """
        return Server(self.registry, port, host)
