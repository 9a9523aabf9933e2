"""How much one device may ask for: token buckets, and a bound on what it has at work.

Each gateway counts for itself: behind N of them a device may have up to N times as much.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from offramp_common.errors import CloudBusy

_DEVICES = (
    10_000  # remembered; who asked longest ago is forgotten first, and starts with full buckets
)


@dataclass(frozen=True, slots=True)
class Quota:
    """Of each device; 0 means no limit.

    requests_per_s     over time, with `burst_s` seconds' worth at once
    layer_runs_per_s   layers run in the cloud, summed over samples: counted once they are known, so
                       that one large request is let in and paid for afterwards
    at_once            requests at work
    """

    requests_per_s: float = 0.0
    layer_runs_per_s: float = 0.0
    burst_s: float = 2.0
    at_once: int = 256

    def __post_init__(self) -> None:
        if min(self.requests_per_s, self.layer_runs_per_s, self.at_once) < 0 or self.burst_s <= 0:
            raise ValueError(f"{self}: must not be negative, burst_s above 0")


class Bucket:
    """Tokens that come at a rate and are kept up to a burst. It may be overdrawn."""

    def __init__(self, rate_per_s: float, burst_s: float, now_s: float) -> None:
        self._rate, self._most = rate_per_s, max(1.0, rate_per_s * burst_s)
        self._level, self._at_s = self._most, now_s

    def wait_s(self, now_s: float, least: float = 1.0) -> float:
        """Until it holds `least` tokens; 0 when it does."""
        self._level = min(self._most, self._level + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        return max(0.0, (least - self._level) / self._rate)

    def take(self, tokens: float) -> None:
        self._level -= tokens


class _Device:
    def __init__(self, quota: Quota, now_s: float) -> None:
        self.at_work = 0
        self.requests, self.layers = (
            Bucket(rate, quota.burst_s, now_s) if rate else None
            for rate in (quota.requests_per_s, quota.layer_runs_per_s)
        )


class Quotas:
    """Every device's account. One event loop."""

    def __init__(self, quota: Quota, clock: Callable[[], float] = time.monotonic) -> None:
        self._quota, self._clock = quota, clock
        self._devices: OrderedDict[str, _Device] = OrderedDict()

    @contextmanager
    def request(self, key: str) -> Iterator[None]:
        """One request of the device is at work meanwhile. Raises CloudBusy, with when to come again."""
        device, now_s, quota = self._device(key), self._clock(), self._quota
        if quota.at_once and device.at_work >= quota.at_once:
            raise CloudBusy(
                f"this device has {device.at_work} requests at work, at most {quota.at_once}; retry "
                "when one is answered"
            )
        for bucket, rate, what in (
            (device.requests, quota.requests_per_s, "requests"),
            (device.layers, quota.layer_runs_per_s, "layer runs"),
        ):
            if bucket is not None and (wait_s := bucket.wait_s(now_s)):
                raise CloudBusy(
                    f"this device's quota is {rate:g} {what} a second; retry after "
                    f"{wait_s * 1e3:.0f} ms",
                    retry_after_ms=wait_s * 1e3,
                )
        if device.requests is not None:
            device.requests.take(1)
        device.at_work += 1
        try:
            yield
        finally:
            device.at_work -= 1

    def charge(self, key: str, layer_runs: int) -> None:
        """What a request has turned out to cost."""
        if (layers := self._device(key).layers) is not None:
            layers.take(layer_runs)

    def _device(self, key: str) -> _Device:
        device = self._devices.get(key)
        if device is None:
            device = self._devices[key] = _Device(self._quota, self._clock())
            if len(self._devices) > _DEVICES:
                self._devices.popitem(last=False)
        self._devices.move_to_end(key)
        return device
