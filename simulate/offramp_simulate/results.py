"""What became of the requests, added up as they come: memory does not grow with their number.

Latencies are counted in bins that grow by half a percent, so a quantile is good to that. The first
answers of device 0 are kept one by one, for a timeline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp_simulate.links import LinkProfile
from offramp_simulate.scenario_parts import Costs

DEVICE, CLOUD, FALLBACK = 0, 1, 2
WHERE = ("device", "cloud", "fallback")
REASONS = ("", "deadline", "timeout", "unavailable", "busy")

_LOW_MS, _GROWTH, _BINS = 1e-3, 1.005, 5000  # up to 1e-3 * 1.005**5000 = 6.8e7 ms
_LOG_GROWTH = math.log(_GROWTH)
_KEPT = 4000
_CDF_SHARES = (0.001, *(i / 50 for i in range(1, 50)), 0.99, 0.995, 0.999)


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Columns of answered requests, one row each, in any order. `cut_N` layers run when it was sent, -1 where
    it never was; `began_s_N` when it was asked."""

    began_s_N: NDArray[np.float64]
    ended_s_N: NDArray[np.float64]
    device_N: NDArray[np.int64]
    where_N: NDArray[np.int8]
    reason_N: NDArray[np.int8]
    exit_N: NDArray[np.int64]
    cut_N: NDArray[np.int64]
    right_N: NDArray[np.bool_]
    up_N: NDArray[np.int64]
    down_N: NDArray[np.int64]
    device_ms_N: NDArray[np.float64]


class Tally:
    """Adds up; `summary` says what came of it."""

    def __init__(
        self, n_layers: int, costs: Costs, profile: LinkProfile, deadline_ms: float
    ) -> None:
        self._costs, self._deadline_ms = costs, deadline_ms
        self._uplink, self._downlink = profile.uplink_mbps * 1e6, profile.downlink_mbps * 1e6
        self._bins = np.zeros(_BINS, np.int64)
        self._exits = np.zeros(n_layers + 1, np.int64)
        self._cuts = np.zeros(n_layers + 2, np.int64)
        self._where = np.zeros(len(WHERE), np.int64)
        self._reasons = np.zeros(len(REASONS), np.int64)
        self._counts = np.zeros(4, np.int64)  # requests, right, missed, sent
        self._bytes = np.zeros(2, np.int64)
        self._sums = np.zeros(3)  # latency ms, device ms, joule
        self._longest_ms = 0.0
        self._beside = 0
        self._kept: list[list[float]] = []
        self.first_s, self.last_s = math.inf, 0.0

    @property
    def requests(self) -> int:
        return int(self._counts[0])

    def add(self, a: Answers) -> None:
        if not len(a.began_s_N):
            return
        ms_N = (a.ended_s_N - a.began_s_N) * 1e3
        bins_N = np.log(np.maximum(ms_N, _LOW_MS) / _LOW_MS) / _LOG_GROWTH
        places_N = np.minimum(bins_N.astype(np.int64), _BINS - 1)
        self._bins += np.bincount(places_N, minlength=_BINS)
        self._exits += np.bincount(a.exit_N, minlength=len(self._exits))
        self._cuts += np.bincount(a.cut_N + 1, minlength=len(self._cuts))
        self._where += np.bincount(a.where_N, minlength=len(WHERE))
        self._reasons += np.bincount(a.reason_N, minlength=len(REASONS))
        missed = int((ms_N > self._deadline_ms).sum())
        sent_N = a.up_N > 0
        self._counts += [len(ms_N), int(a.right_N.sum()), missed, int(sent_N.sum())]
        up, down = int(a.up_N.sum()), int(a.down_N.sum())
        self._bytes += [up, down]
        radio_s = up * 8 / self._uplink + down * 8 / self._downlink
        c, device_ms = self._costs, float(a.device_ms_N.sum())
        joule = c.compute_w * device_ms / 1e3 + c.radio_w * radio_s
        joule += c.radio_wake_j * int(sent_N.sum())
        self._sums += [float(ms_N.sum()), device_ms, joule]
        self._longest_ms = max(self._longest_ms, float(ms_N.max()))
        self.first_s = min(self.first_s, float(a.began_s_N.min()))
        self.last_s = max(self.last_s, float(a.ended_s_N.max()))
        self._keep(a, ms_N)

    def wasted(self, ms: float) -> None:
        """The device computed so long for nothing."""
        self._sums += [0.0, ms, self._costs.compute_w * ms / 1e3]

    def beside(self, nbytes: int) -> None:
        """Bytes of probes, greetings, pings and cancels: they cost, and belong to no answer."""
        self._beside += nbytes

    def quantile_ms(self, share: float) -> float:
        """Good to half a percent; the longest is exact."""
        total = int(self._bins.sum())
        rank = share * total
        place = int(np.searchsorted(np.cumsum(self._bins), rank))
        middle = _LOW_MS * _GROWTH ** (min(place, _BINS - 1) + 0.5)
        return float(min(middle, self._longest_ms))

    def summary(self) -> dict[str, Any]:
        """Plain data, the same for the same answers whatever order they came in (sums of floats to their
        rounding)."""
        n, right, missed, sent = (int(v) for v in self._counts)
        if n == 0:
            return {"requests": 0}
        up, down = (int(v) for v in self._bytes)
        span_s = self.last_s - self.first_s
        return {
            "requests": n,
            "seconds": _short(span_s),
            "answers_per_s": _short(n / span_s) if span_s > 0 else None,
            "right": right / n,
            "ms": {
                "mean": _short(self._sums[0] / n),
                **{
                    f"p{100 * q:g}": _short(self.quantile_ms(q))
                    for q in (0.05, 0.5, 0.9, 0.95, 0.99)
                },
                "longest": _short(self._longest_ms),
            },
            "cdf_ms": [[q, _short(self.quantile_ms(q))] for q in _CDF_SHARES],
            "where": {name: int(v) / n for name, v in zip(WHERE, self._where, strict=True)},
            "reasons": {
                r: int(v) / n for r, v in zip(REASONS, self._reasons, strict=True) if r and v
            },
            "exits": {str(depth): int(v) / n for depth, v in enumerate(self._exits) if v},
            "cuts": {
                str(depth - 1): int(v) / n for depth, v in enumerate(self._cuts) if v and depth
            },
            "sent": sent / n,
            "missed": missed / n,
            "bytes_up": _short(up / n),
            "bytes_down": _short(down / n),
            "bytes_beside": _short(self._beside / n),
            "device_ms": _short(self._sums[1] / n),
            "device_mj": _short(1e3 * self._sums[2] / n),
        }

    def cloud(self, busy_s: float, replica_s: float, rows_a_layer: float | None) -> dict[str, Any]:
        """What the cloud did for them."""
        n, c = max(self.requests, 1), self._costs
        traffic = (int(self._bytes.sum()) + self._beside) / 1e9 * c.traffic_usd_per_gb
        per_hour = c.replica_usd_per_hour / 3600
        return {
            "cloud_ms": _short(1e3 * busy_s / n),
            "rows_a_layer": None if rows_a_layer is None else _short(rows_a_layer),
            "engine_used": _short(busy_s / replica_s) if replica_s > 0 else 0.0,
            "replicas": _short(replica_s / self.last_s) if self.last_s > 0 else 0.0,
            "usd_per_million": _short((busy_s * per_hour + traffic) / n * 1e6),
            "usd_per_million_reserved": _short((replica_s * per_hour + traffic) / n * 1e6),
        }

    @property
    def timeline(self) -> list[list[float]]:
        """Device 0's first answers: [asked s, ms, where, cut, exit, bytes up], in order of asking."""
        return sorted(self._kept)

    def _keep(self, a: Answers, ms_N: NDArray[np.float64]) -> None:
        room = _KEPT - len(self._kept)
        if room <= 0:
            return
        for i in np.flatnonzero(a.device_N == 0)[:room]:
            row = (a.began_s_N[i], ms_N[i], a.where_N[i], a.cut_N[i], a.exit_N[i], a.up_N[i])
            self._kept.append([_short(float(value)) for value in row])


def _short(value: float) -> float:
    """Six digits: what is printed and stored."""
    return float(f"{float(value):.6g}")
