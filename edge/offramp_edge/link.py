"""What the device believes of the network, from real transfers.

A transfer of b bytes that spent t milliseconds on the network (the cloud's own time taken off) tells
rtt + b / goodput. Over transfers of different sizes a line through the points gives both; older
points count less. Small and honest: where sizes differ too little to tell, the goodput is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

from offramp_common.clock import Clock

_KEEP = 0.9
"""What an older transfer still counts for when a new one comes: about the last ten matter."""
_MIN_SPREAD_BYTES = 512.0
"""Standard deviation of the sizes below which a slope is noise."""
_MIN_TRANSFERS = 3


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """rtt_ms       time of an empty exchange; None before the first transfer
    uplink_mbps  goodput; None where it is not known
    age_s        since the last transfer that ended well; None when there was none
    transfers, failures  so far
    """

    rtt_ms: float | None
    uplink_mbps: float | None
    age_s: float | None
    transfers: int
    failures: int


class Link:
    """Collects transfers and estimates the link."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._last_s: float | None = None
        self._transfers = self._failures = 0

    def transferred(self, nbytes: int, network_ms: float) -> None:
        """An exchange went well: `nbytes` up, and so long on the network."""
        self._weight = self._weight * _KEEP + 1
        self._x = self._x * _KEEP + nbytes
        self._y = self._y * _KEEP + network_ms
        self._xx = self._xx * _KEEP + nbytes * nbytes
        self._xy = self._xy * _KEEP + nbytes * network_ms
        self._last_s = self._clock.now()
        self._transfers += 1

    def failed(self) -> None:
        """An exchange had no answer."""
        self._failures += 1

    def estimate(self) -> LinkEstimate:
        age_s = None if self._last_s is None else self._clock.now() - self._last_s
        rtt_ms, uplink_mbps = self._line()
        return LinkEstimate(rtt_ms, uplink_mbps, age_s, self._transfers, self._failures)

    def _line(self) -> tuple[float | None, float | None]:
        """(intercept in ms, slope as Mbit/s)."""
        if not self._transfers:
            return None, None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        if self._transfers < _MIN_TRANSFERS or variance < _MIN_SPREAD_BYTES**2:
            return mean_y, None
        ms_per_byte = (self._xy / self._weight - mean_x * mean_y) / variance
        rtt_ms = mean_y - ms_per_byte * mean_x
        if ms_per_byte <= 0 or rtt_ms < 0:
            return mean_y, None
        return rtt_ms, 8e-3 / ms_per_byte
