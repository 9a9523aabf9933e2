"""How busy the device is, from how many samples wait when one comes: no clock, so that a simulator may ask.

Of samples that come by chance the one that comes finds, on average, as many waiting as there are. Where
times vary as much as their mean (a few long samples among many short ones) a device at work for a share r of
its time has r^2 / (1 - r) waiting; turned round, the number tells the share (M/M/1).
"""

from __future__ import annotations

import math

_NEW = 0.05  # weight of the latest sample
_MOST = 9  # tenths; beyond, those who wait say it all


class Crowd:
    """Told of each sample that comes, and of the device's time each took."""

    def __init__(self) -> None:
        self._waiting = 0.0
        self._work_ms = 0.0

    def came(self, waiting: int) -> None:
        """A sample's turn has come, and so many wait behind it."""
        self._waiting += _NEW * (waiting - self._waiting)

    def took(self, device_ms: float) -> None:
        """A sample was answered, after so long on the device."""
        if device_ms <= 0:
            return
        if not self._work_ms:
            self._work_ms = device_ms
        self._work_ms += _NEW * (device_ms - self._work_ms)

    def tenths(self) -> int:
        """The share of its time that the device is at work, in whole tenths below one."""
        waiting = self._waiting
        if not waiting:
            return 0
        busy = (math.sqrt(waiting * waiting + 4 * waiting) - waiting) / 2
        return min(_MOST, round(10 * busy))

    def arrivals(self, busy: float) -> float:
        """Samples that come in a millisecond, at that share."""
        return busy / self._work_ms if self._work_ms else 0.0
