"""HyStart: end TCP's slow start before the queue is full (Ha and Rhee, Computer Networks 55, 2011).

As in Linux: either the ACKs of a round come without a gap for longer than half a round trip, so that
what is under way fills the link, or the least of a round's first samples is later than the least seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class HyStart:
    """What has been heard of the running round; all in seconds."""

    low_window = 16
    samples = 8
    ack_gap_s = 0.002
    slack_s = (0.004, 0.016)
    end: int = 0  # the round ends with the ACK of this segment
    start_s: float = -math.inf
    train_s: float = -math.inf
    rtts_s: list[float] = field(default_factory=list)

    def begins(self, number: int, acked_s: float, next_number: int) -> bool:
        """Whether this ACK, of segment `number`, begins a round; it ends with that of `next_number`."""
        if number < self.end:
            return False
        self.end = next_number
        self.start_s = self.train_s = acked_s
        self.rtts_s = []
        return True

    def found(self, acked_s: float, rtt_s: float, least_s: float) -> bool:
        """Whether this sample of the round trip, `least_s` being the least so far, says to stop."""
        self.rtts_s.append(rtt_s)
        if acked_s - self.train_s <= self.ack_gap_s:
            self.train_s = acked_s
            if acked_s - self.start_s > least_s / 2:
                return True
        slack_s = min(max(least_s / 8, self.slack_s[0]), self.slack_s[1])
        return len(self.rtts_s) == self.samples and min(self.rtts_s) >= least_s + slack_s
