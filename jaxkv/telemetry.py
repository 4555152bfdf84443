"""Cache metrics for Prometheus and for callbacks; see `jaxkv.memory.telemetry`."""

from jaxkv.memory.telemetry import Telemetry as Telemetry
