"""What a gateway is at the moment, for its metrics: who is there, what is at work, what it leans on."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from offramp_cloud.gateway import Gateway
from offramp_cloud.served import Served

_RECENT_S = 60.0
_MOST = 100_000  # callers that are remembered; a minute of strangers must not fill the memory


class Recent:
    """How many callers were heard of within the last minute: devices by name, those without a
    certificate by address. Written in one thread; others may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard_s: OrderedDict[str, float] = OrderedDict()  # who spoke longest ago comes first

    def observe(self, served: Served) -> None:
        key = served.device or served.peer.rpartition(":")[0]
        self._heard_s[key] = self._clock()
        self._heard_s.move_to_end(key)
        self._forget()

    def _forget(self) -> None:
        old_s = self._clock() - _RECENT_S
        while self._heard_s:
            key, at_s = next(iter(self._heard_s.items()))
            if at_s >= old_s and len(self._heard_s) <= _MOST:
                return
            del self._heard_s[key]

    def count(self) -> int:
        old_s = self._clock() - _RECENT_S
        return sum(at_s >= old_s for at_s in list(self._heard_s.values()))


def add_gauges(registry: CollectorRegistry, gateway: Gateway) -> None:
    """Call it in the gateway's event loop, before it starts."""
    recent, loop = Recent(), asyncio.get_running_loop()
    gateway.observers.append(recent.observe)
    for name, text, read in (
        ("devices", "Devices heard of within the last minute.", recent.count),
        ("at_work", "Requests that are being served.", lambda: gateway.at_work),
        ("tasks", "Tasks of the gateway's event loop.", lambda: len(asyncio.all_tasks(loop))),
    ):
        Gauge(f"offramp_cloud_{name}", text, registry=registry).set_function(read)
    registry.register(_Replicas(gateway))
    registry.register(_Stalled(gateway))


class _Replicas:
    """Bundles that nobody answers for are shown with 0: what is not there raises no alarm."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterable[Metric]:
        there = Counter(bundle for bundle, _ in list(self._gateway.replicas))
        family = GaugeMetricFamily(
            "offramp_cloud_replicas", "Replicas that have answered lately.", labels=["bundle"]
        )
        for bundle in {*self._gateway.bundles, *there}:
            family.add_metric([bundle], there[bundle])
        return [family]


class _Stalled:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "offramp_cloud_stalled",
            "Calls ended because their request did not come, a reply was not taken, or nothing was asked.",
            labels=["what"],
        )
        for what, count in self._gateway.stalled.items():
            family.add_metric([what], count)
        return [family]
