"""How busy the device is, from who comes while a sample has it: no clock, so that a simulator may ask.

Whom a sample delays are those who come while it is on the device, so those are counted, sample by sample,
and the time that they had for it. By chance as many come in any other millisecond; where the next one comes
because the last was answered, nobody comes meanwhile, and nobody is counted. A count tells of a load from the
first sample on; the length of the queue, which it replaced, only once the queue has had time to grow.
"""

from __future__ import annotations

_NEW = 0.1  # weight of the latest sample, once there are many
_MOST = 4  # fifths; beyond, those who wait say it all


class Crowd:
    """Told of each sample whose turn comes, and of the device's time each took."""

    def __init__(self) -> None:
        self._waiting = 0  # behind the sample that has the device
        self._came = self._work_ms = 0.0  # a sample's, on average: who came meanwhile, its time
        self._counted = self._timed = 0

    def came(self, waiting: int, waited: bool) -> None:
        """A sample's turn has come, and so many wait behind it. `waited`: it came while the one before it had
        the device."""
        came = max(0, waiting + waited - self._waiting) if waited else waiting
        self._waiting = waiting
        self._counted += 1
        self._came += max(_NEW, 1 / (self._counted + 1)) * (came - self._came)

    def took(self, device_ms: float) -> None:
        """A sample was answered, after so long on the device."""
        self._timed += 1
        self._work_ms += max(_NEW, 1 / (self._timed + 1)) * (device_ms - self._work_ms)

    def fifths(self) -> int:
        """The share of its time that the device is at work, in whole fifths below one: finer steps would have
        the planner solve anew for every other sample."""
        return min(_MOST, round(5 * self._came))

    def arrivals(self) -> float:
        """Samples that come in a millisecond."""
        return self._came / self._work_ms if self._work_ms else 0.0
