"""Prometheus metrics of a gateway and of the replicas behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from offramp_cloud.backends import Replica
from offramp_cloud.served import Served
from offramp_common.errors import ConfigError

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Replicas = Mapping[tuple[str, str], Replica]
"""(bundle, the replica's name) -> what that replica last answered to a probe."""


class Metrics:
    """One registry of its own. `observe` is an observer of the gateway's requests."""

    def __init__(self, replicas: Callable[[], Replicas]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "offramp_cloud_requests",
            "Requests by gRPC status.",
            ["bundle", "status"],
            registry=self.registry,
        )
        self._bytes = self._counter("request_bytes", "Bytes of requests, as serialized.")
        self._reply_bytes = self._counter("reply_bytes", "Bytes of answers, as serialized.")
        self._rows = self._counter("rows", "Samples answered.")
        self._exits = Counter(
            "offramp_cloud_exits",
            "Samples answered, by the depth at which they left.",
            ["bundle", "depth"],
            registry=self.registry,
        )
        self._seconds = self._histogram("request_seconds", "From a request's arrival to its reply.")
        self._queue = self._histogram("queue_seconds", "Time that requests waited to be run.")
        self._compute = self._histogram("compute_seconds", "Time that requests were run.")
        self.registry.register(_Engines(replicas))
        self._http: tuple[WSGIServer, threading.Thread] | None = None

    def observe(self, served: Served) -> None:
        # A name that is served nowhere never becomes `bundle`: strangers add no label.
        bundle = served.bundle
        self._requests.labels(bundle, served.status).inc()
        self._bytes.labels(bundle).inc(served.nbytes)
        self._reply_bytes.labels(bundle).inc(served.reply_nbytes)
        self._seconds.labels(bundle).observe(served.ms / 1e3)
        if not served.rows:
            return
        self._rows.labels(bundle).inc(served.rows)
        for depth in served.exit_depths:
            self._exits.labels(bundle, str(depth)).inc()
        self._queue.labels(bundle).observe(served.queue_ms / 1e3)
        self._compute.labels(bundle).observe(served.compute_ms / 1e3)

    def listen(self, address: str) -> str:
        """Serve /metrics on HOST:PORT (port 0: a free one); returns it. Raises ConfigError."""
        host, _, port = address.rpartition(":")
        try:
            self._http = start_http_server(int(port), host.strip("[]"), self.registry)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--metrics {address!r}: cannot listen there ({error}); give a free HOST:PORT"
            ) from error
        return f"{host}:{self._http[0].server_port}"

    def close(self) -> None:
        if self._http is not None:
            server, thread = self._http
            server.shutdown()
            server.server_close()
            thread.join()
            self._http = None

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(f"offramp_cloud_{name}", help_text, ["bundle"], registry=self.registry)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(
            f"offramp_cloud_{name}",
            help_text,
            ["bundle"],
            buckets=_SECONDS,
            registry=self.registry,
        )


class _Engines:
    """The replicas' own counters; they start at 0 with each replica, whose process and node are a label."""

    def __init__(self, replicas: Callable[[], Replicas]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        labels = ["bundle", "replica"]
        plain = {
            name: CounterMetricFamily(f"offramp_engine_{name}", help_text, labels=labels)
            for name, help_text in (
                ("requests", "Requests answered."),
                ("failed", "Requests whose layers raised."),
                ("dropped", "Samples left out on the way: nobody waited for them any more."),
                ("tokens", "Tokens of requests answered."),
                ("layer_rows", "Layers run, times the samples in them."),
                ("layer_tokens", "Layers run, times the tokens in them."),
                ("compute_seconds", "Time in layers and exit heads."),
                ("overhead_seconds", "Time in choosing, joining and letting out."),
            )
        }
        left = GaugeMetricFamily(
            "offramp_engine_work_left", "Layers x tokens that wait or run.", labels=labels
        )
        batches = HistogramMetricFamily(
            "offramp_engine_batch_rows", "Samples that shared a layer.", labels=labels
        )
        for (bundle, which), replica in dict(self._replicas()).items():
            where, counters = [bundle, which], replica.counters
            for name, family in plain.items():
                family.add_metric(where, counters[name.replace("_seconds", "_s")])
            left.add_metric(where, counters["work_left"])
            sizes: Mapping[int, int] = counters["batches"]
            below = [(str(most), _at_most(sizes, most)) for most in (*_BATCH_ROWS, float("inf"))]
            buckets = [(label.replace("inf", "+Inf"), count) for label, count in below]
            batches.add_metric(where, buckets, sum(n * count for n, count in sizes.items()))
        return [*plain.values(), left, batches]


def _at_most(sizes: Mapping[int, int], most: float) -> float:
    return float(sum(count for size, count in sizes.items() if size <= most))
