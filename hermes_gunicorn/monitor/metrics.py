"""/metrics: for Prometheus, through its own client library (extra ``metrics``)."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from hermes_gunicorn.core.layout import STATES
from hermes_gunicorn.monitor.watch import Watch

__all__ = ["render"]

# Of a worker: name, help, key. One series for each slot in use.
_GAUGES = (
    ("requests", "Requests in flight", "requests"),
    ("connections", "Open connections", "connections"),
    ("queued_connections", "Connections sent to the worker that it has not taken", "queued"),
    ("busy_seconds", "For how long the loop has not turned; 0 in poll", "busy"),
    ("hung", "Whether the loop has not turned for the hang threshold", "hung"),
    ("eligible", "Whether the worker may be sent connections", "eligible"),
    ("resident_memory_bytes", "Resident memory", "rss"),
)
_COUNTERS = (
    ("dispatched_connections", "Connections the kernel sent to the worker", "dispatched"),
    ("rescued_connections", "Connections it took from siblings in need", "rescued"),
    ("hangs", "Episodes in which it hung for over 0.2 s", "hangs"),
    ("lives", "Processes that have been this worker", "lives"),
    ("cpu_seconds", "CPU time", "cpu_seconds"),
)
_BIND_COUNTERS = (
    ("dispatched_connections", "Connections given to a worker", "dispatched"),
    ("hung_workers_skipped", "Workers passed over as they hung", "hung_skipped"),
    ("no_worker_connections", "Connections that found all workers hung", "none_eligible"),
    ("failed_selections", "Choices that had no listener", "select_failed"),
    ("spilled_connections", "Connections to another locality group", "spilled"),
)


class _Table(Collector):  # type: ignore[misc]
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def collect(self) -> Iterator[Metric]:
        status = self._watch.status()
        workers = status["workers"]
        info = {key: str(status[key]) for key in ("policy", "worker_class", "gunicorn", "name")}
        yield InfoMetricFamily("hermes", "The server", value=info)
        yield GaugeMetricFamily(
            "hermes_hang_threshold_seconds", "hermes_hang_threshold", status["threshold"]
        )
        states = GaugeMetricFamily("hermes_workers", "Workers by state", labels=["state"])
        for state in STATES[1:]:
            states.add_metric([state], sum(worker["state"] == state for worker in workers))
        yield states
        for families, prefix, rows, label, key in (
            (_GAUGES, "hermes_worker", workers, "slot", "slot"),
            (_COUNTERS, "hermes_worker", workers, "slot", "slot"),
            (_BIND_COUNTERS, "hermes_bind", status["binds"], "bind", "address"),
        ):
            kind = GaugeMetricFamily if families is _GAUGES else CounterMetricFamily
            for name, text, field in families:
                family = kind(f"{prefix}_{name}", text, labels=[label])
                for row in rows:
                    family.add_metric([str(row[key])], float(row[field]))
                yield family
        mode = GaugeMetricFamily(
            "hermes_bind_kernel_dispatch",
            "Whether the kernel chooses; 0: shared mode",
            labels=["bind"],
        )
        for bind in status["binds"]:
            mode.add_metric([bind["address"]], bind["mode"] == "kernel")
        yield mode


def render(watch: Watch, accept: str) -> tuple[str, bytes]:
    """Return content type and body, OpenMetrics to those who ask for it."""
    registry = CollectorRegistry()
    registry.register(_Table(watch))
    encode, kind = choose_encoder(accept)
    return kind, encode(registry)
