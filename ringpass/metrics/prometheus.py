"""The metrics as `prometheus_client` exposes them: read when they are scraped, nothing is kept twice.

ringpass_seconds             histogram, label "kind": as in `snapshot()["seconds"]`
ringpass_received_bytes_total, ringpass_messages_total     counters, label "kind"
ringpass_calls_total, ringpass_compilations_total, ringpass_recompilations_total, ringpass_stalls_total
ringpass_longest_wait_seconds     gauge: how long the longest wait lasts that has not ended, 0 if there is none
ringpass_peak_bytes               gauge, label "where"
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ringpass.metrics import recorder

try:
    import prometheus_client
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector as BaseCollector
except ImportError as error:
    raise ImportError(
        'the metrics of ringpass need prometheus_client for this: pip install "ringpass[metrics]"'
    ) from error

COUNTERS = {
    "calls": "calls of compiled models",
    "compilations": "graphs that were compiled",
    "recompilations": "graphs that were compiled again for other inputs",
    "stalls": "waits that ringpass.watch reported",
}


class Collector(BaseCollector):
    """Gives a registry the metrics of this process; none while they are off."""

    def collect(self) -> Iterator[Any]:
        """The families of metrics, as they are now."""
        if recorder.active is None:
            return
        found = recorder.active.snapshot()
        for name, meaning in COUNTERS.items():
            yield CounterMetricFamily(f"ringpass_{name}", meaning, value=found[name])
        for name, key, meaning in (
            ("received_bytes", "bytes", "bytes that arrived"),
            ("messages", "messages", "messages that arrived"),
        ):
            family = CounterMetricFamily(f"ringpass_{name}", meaning, labels=["kind"])
            for kind, value in found[key].items():
                family.add_metric([kind], value)
            yield family
        yield _seconds(found["seconds"])
        longest = max((wait["seconds"] for wait in found["waiting"]), default=0.0)
        yield GaugeMetricFamily("ringpass_longest_wait_seconds", "the longest wait that has not ended", value=longest)
        peak = GaugeMetricFamily("ringpass_peak_bytes", "the most memory so far", labels=["where"])
        for where, value in found["peak bytes"].items():
            peak.add_metric([where], value)
        yield peak


def _seconds(found: dict[str, Any]) -> Any:
    family = HistogramMetricFamily("ringpass_seconds", "seconds on the host, by kind of work", labels=["kind"])
    for kind, histogram in found.items():
        bounds = [("+Inf" if bound == float("inf") else f"{bound:g}", n) for bound, n in histogram["buckets"].items()]
        family.add_metric([kind], bounds, histogram["total"])
    return family


def default_registry() -> prometheus_client.CollectorRegistry:
    """The registry that `prometheus_client.start_http_server` serves."""
    return prometheus_client.REGISTRY


def text() -> str:
    """All of it in Prometheus' text format."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector())
    return prometheus_client.generate_latest(registry).decode()
