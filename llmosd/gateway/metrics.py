"""/metrics: what the daemon counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llmos.types import Status, Worker


class _Snapshot:
    """One look, as a collector."""

    def __init__(self, status: Status, workers: tuple[Worker, ...], answers: Mapping[int, int]) -> None:
        self._status = status
        self._workers = workers
        self._answers = answers

    def collect(self) -> Iterable[Metric]:
        status = self._status
        yield GaugeMetricFamily("llmos_requests_running", "Requests on a slot.", status.requests_running)
        yield GaugeMetricFamily("llmos_requests_waiting", "Requests in a queue.", status.requests_waiting)
        yield GaugeMetricFamily("llmos_uptime_seconds", "Since the daemon started.", status.uptime)
        counts = CounterMetricFamily("llmos_events", "What the daemon counted, by name.", labels=["event"])
        for name, count in sorted(status.counters.items()):
            counts.add_metric([name], count)
        yield counts
        answers = CounterMetricFamily("llmos_http_answers", "What this gateway answered, by status.", labels=["status"])
        for code, count in sorted(self._answers.items()):
            answers.add_metric([str(code)], count)
        yield answers
        gauges = (
            ("llmos_worker_up", "1 while the worker takes requests.", lambda worker: float(worker.state == "ready")),
            ("llmos_worker_slots", "Requests it runs at once.", lambda worker: worker.slots),
            ("llmos_worker_slots_used", "Requests it runs.", lambda worker: worker.slots_used),
            ("llmos_worker_memory_bytes", "Anonymous and shared memory.", lambda worker: worker.memory_bytes),
            ("llmos_worker_cpu_ratio", "CPUs in use.", lambda worker: worker.cpu_percent / 100),
        )
        for name, text, value in gauges:
            family = GaugeMetricFamily(name, text, labels=["worker", "model"])
            for worker in self._workers:
                family.add_metric([worker.name, worker.model], value(worker))
            yield family
        restarts = CounterMetricFamily("llmos_worker_restarts", "Restarts.", labels=["worker", "model"])
        for worker in self._workers:
            restarts.add_metric([worker.name, worker.model], worker.restarts)
        yield restarts


def render(status: Status, workers: tuple[Worker, ...], answers: Mapping[int, int]) -> bytes:
    """The text of /metrics. `answers`: how many this gateway gave, by HTTP status."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(status, workers, answers))
    return generate_latest(registry)
