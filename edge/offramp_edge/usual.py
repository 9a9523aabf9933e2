"""When an answer from the cloud is later than usual."""

from __future__ import annotations

_NEW_MEAN, _NEW_SPREAD = 1 / 8, 1 / 4
_SPREADS = 4.0
_MOST_STRETCH = 64.0


class UsualTime:
    """The estimate of TCP's retransmission timer (Jacobson 1988, RFC 6298): mean and mean deviation, moving;
    late is what is beyond the mean by four deviations.

    Answers that nobody waited for in the end are not among those seen. So each one given up doubles the
    time, but only those that were sent after the last doubling, until an answer comes: else a link that has
    become slower would for ever look like the old one.
    """

    def __init__(self) -> None:
        self._mean_s: float | None = None
        self._spread_s = 0.0
        self._stretch = 1.0
        self._stretched_s = float("-inf")

    def took(self, seconds: float) -> None:
        """An answer came after so long."""
        if self._mean_s is None:
            self._mean_s, self._spread_s = seconds, seconds / 2
        else:
            self._spread_s += _NEW_SPREAD * (abs(seconds - self._mean_s) - self._spread_s)
            self._mean_s += _NEW_MEAN * (seconds - self._mean_s)
        self._stretch = 1.0

    def given_up(self, began_s: float, now_s: float) -> None:
        """An answer to what was asked at `began_s` is not waited for any more."""
        if began_s >= self._stretched_s:
            self._stretch = min(_MOST_STRETCH, 2 * self._stretch)
            self._stretched_s = now_s

    @property
    def known(self) -> bool:
        """False before the first answer, and again once one was given up."""
        return self._mean_s is not None and self._stretch == 1

    @property
    def late_s(self) -> float | None:
        """After so long an answer is late; None before the first one."""
        if self._mean_s is None:
            return None
        return self._stretch * (self._mean_s + _SPREADS * self._spread_s)
