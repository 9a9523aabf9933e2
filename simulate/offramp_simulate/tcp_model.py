"""When what one end of a TCP connection sends arrives: a model on a clock that the caller owns.

One sender over one `Shaper`, a segment at a time, as Linux does it with CUBIC: an initial window of
ten segments, doubled each round trip; HyStart, which ends that when ACKs come late or in a long
train; no growth of a window that is not used; the window halved for each time-out that the connection
was idle; an ACK for each segment at first, later for every second. A segment is lost when its packet
is, or finds the queue full; it is sent again a round trip and a quarter after it was sent if a later
one has arrived by then (RACK; without the quarter if three have), or by a probe after two round trips,
or when the timer runs out. The window is then 0.7 of what it was, approached as the ACKs come in (PRR). What
is sent arrives in order, so that a message waits for all before it on its connection (HTTP/2 has one
for all): head-of-line blocking.

Left out: CUBIC's growth (a segment a round trip instead, as in its Reno mode), pacing, a receiver
whose window is full, lost ACKs, doubled timers, and other senders in the same queue.
`benchmarks/tcp_model.py` compares it with the kernel's over the layer-3 link; constants are Linux 6's.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from offramp_simulate.hystart import HyStart
from offramp_simulate.links import Shaper
from offramp_simulate.loss import RTO_MIN_S, LossDraws

_QUICK_ACKS = 16  # segments that are acknowledged one by one
_DELAYED_ACK_S = 0.04  # then an ACK waits so long for a second segment
_BETA = 0.7
_DUPLICATES = 3
_NO_ROUND_TRIP_S = 0.8  # a timer before the first sample: 1 s


@dataclass(frozen=True)
class TcpSettings:
    """Of the sender; the defaults are those of Linux over IPv4 with an MTU of 1500."""

    mss_nbytes: int = 1448
    header_nbytes: int = 52
    initial_window: int = 10  # segments
    slow_start_after_idle: bool = True  # false for BBR, whatever the sysctl says
    hystart: bool = True


@dataclass(slots=True)
class _Segment:
    """Sent and not yet acknowledged, or to be sent."""

    number: int
    nbytes: int
    sent_s: float = -math.inf
    acked_s: float = math.inf  # infinity: it was lost
    order: int = -1  # of sending; when it is sent again, a new one
    later: int = 0  # acknowledged ones that were sent after it
    given_up_s: float = math.inf  # RACK: when it counts as lost, if nothing comes before


@dataclass(slots=True)
class _Message:
    number: int
    last: int  # its last segment
    arrives_s: float  # of all segments up to the last that have made it so far


class TcpSender:
    """One direction of an established connection; times must not go back from call to call.

    `back_s` is how long an ACK takes; the shaper's own delay is the way there. The owner of the clock
    calls `send`, and `advance` at `next_s` at the latest; both return messages whose arrival is now
    known, as (number, when its last byte arrives), numbers counting from 0.
    """

    def __init__(
        self,
        shaper: Shaper,
        back_s: float,
        settings: TcpSettings | None = None,
        losses: LossDraws | None = None,
    ) -> None:
        self._shaper = shaper
        self._back_s = back_s
        self._settings = settings or TcpSettings()
        self._losses = losses
        self.window: float = self._settings.initial_window  # segments
        self._threshold = math.inf
        self._to_send: deque[_Segment] = deque()
        self._again: deque[_Segment] = deque()  # known to be lost
        self._lost: list[_Segment] = []  # not yet known to be
        self._under_way: deque[_Segment] = deque()  # by when they are acknowledged
        self._repairing: set[int] = set()  # known to have been lost, not yet acknowledged
        self._recovering = False
        self._flight, self._delivered, self._resent = 1, 0, 0  # of a recovery: PRR's counts
        self._messages: deque[_Message] = deque()
        self._n_messages = self._n_segments = self._n_handed = self._order = 0
        self._unanswered: _Segment | None = None  # its ACK waits for the next segment
        self._sent_s = self._heard_s = -math.inf
        self._most_out = 0  # in this round: a window that is not used does not grow
        self._srtt_s: float | None = None
        self._least_rtt_s = math.inf
        self._hystart = HyStart()

    @property
    def timeout_s(self) -> float:
        """Linux's RTO: the round trip and 200 ms."""
        return (self._srtt_s or _NO_ROUND_TRIP_S) + RTO_MIN_S

    def send(self, nbytes: int, now_s: float) -> list[tuple[int, float]]:
        """Hand a message of one byte at least to the socket."""
        known = self.advance(now_s)
        self._restart(now_s)
        mss = self._settings.mss_nbytes
        for start in range(0, nbytes, mss):
            self._to_send.append(_Segment(self._n_segments, min(mss, nbytes - start)))
            self._n_segments += 1
        self._messages.append(_Message(self._n_messages, self._n_segments - 1, -math.inf))
        self._n_messages += 1
        self._pump(now_s)
        return known + self._complete()

    def next_s(self) -> float:
        """When something happens next: an ACK or a timer; infinity when nothing is open."""
        ack_s = self._under_way[0].acked_s if self._under_way else math.inf
        return min(ack_s, self._timer_s()) if self._lost or self._again else ack_s

    def advance(self, now_s: float) -> list[tuple[int, float]]:
        """Let everything happen up to `now_s`; infinity: until all has arrived."""
        known = []
        while (next_s := self.next_s()) <= now_s and next_s < math.inf:
            if self._under_way and self._under_way[0].acked_s <= next_s:
                self._acknowledged(self._under_way.popleft())
            else:
                self._timer_ran_out(next_s)
            if self._messages:
                known += self._complete()
        return known

    def _complete(self) -> list[tuple[int, float]]:
        """Messages of which every byte has made it, in order."""
        first_open = self._n_handed
        if self._lost or self._again:
            first_open = min(segment.number for segment in (*self._lost, *self._again))
        known = []
        while self._messages and self._messages[0].last < first_open:
            message = self._messages.popleft()
            known.append((message.number, message.arrives_s))
        return known

    def _pump(self, now_s: float, most: float = math.inf) -> None:
        """Send what the window allows, first what is to be sent again."""
        while (self._again or self._to_send) and self._out() < int(self.window):
            if most < 1:
                return
            most -= 1
            if self._again:
                self._transmit(self._again.popleft(), now_s)
            else:
                self._n_handed += 1
                self._transmit(self._to_send.popleft(), now_s)

    def _out(self) -> int:
        """Segments that the sender has to believe under way."""
        return len(self._under_way) + len(self._lost)

    def _transmit(self, segment: _Segment, now_s: float) -> None:
        segment.sent_s, segment.order = now_s, self._order
        segment.later, segment.given_up_s = 0, math.inf
        self._order += 1
        self._resent += 1
        self._sent_s = now_s
        passage = self._shaper.offer(segment.nbytes + self._settings.header_nbytes, now_s)
        if passage is None or (self._losses is not None and self._losses.lost()):
            self._lost.append(segment)
            return
        for message in self._messages:
            if message.last >= segment.number:
                message.arrives_s = max(message.arrives_s, passage.arrives_s)
        segment.acked_s = passage.arrives_s + self._back_s
        waiting, self._unanswered = self._unanswered, None
        if waiting is not None and segment.acked_s < waiting.acked_s:
            waiting.acked_s = segment.acked_s  # one ACK for both
        elif segment.number >= _QUICK_ACKS and not (self._lost or self._repairing):
            segment.acked_s += _DELAYED_ACK_S
            self._unanswered = segment
        self._under_way.append(segment)
        self._most_out = max(self._most_out, self._out())

    def _acknowledged(self, segment: _Segment) -> None:
        now_s = self._heard_s = segment.acked_s
        self._sample(segment)
        self._repairing.discard(segment.number)
        if self._lost:
            self._suspect(segment)
            self._give_up([lost for lost in self._lost if lost.given_up_s <= now_s])
        if not self._recovering:
            self._grow()
            self._pump(now_s)
            return
        self._delivered += 1
        if not self._repairing:
            self._recovering = False
            self._pump(now_s)
        elif self._out() >= self.window:
            allowed = math.ceil(self._delivered * self.window / self._flight) - self._resent
            self._pump(now_s, allowed)
        else:
            self._pump(now_s, max(self._delivered - self._resent, 1) + 1)

    def _suspect(self, heard: _Segment) -> None:
        """What was sent before a segment that has arrived should have too; ACKs tell in any order."""
        rtt_s = heard.acked_s - heard.sent_s
        patience_s = min(self._least_rtt_s / 4, (self._srtt_s or 0.0) / 8)
        for lost in self._lost:
            if lost.order < heard.order:
                lost.later += 1
                at_once = self._recovering or lost.later >= _DUPLICATES
                lost.given_up_s = lost.sent_s + rtt_s + (0.0 if at_once else patience_s)

    def _give_up(self, lost: list[_Segment]) -> None:
        """These are known to be lost now: they go again, and the window shrinks once."""
        if not lost:
            return
        if not self._recovering:
            self._recovering = True
            self._flight = self._out() + 1
            self._delivered = self._resent = 0
            self.window = self._threshold = max(2.0, self.window * _BETA)
        for segment in lost:
            self._lost.remove(segment)
            self._repairing.add(segment.number)
            segment.acked_s = math.inf
        self._again = deque(sorted([*self._again, *lost], key=lambda segment: segment.number))

    def _timer_s(self) -> float:
        """When the sender acts though it has heard nothing; something is lost."""
        given_up_s = min((lost.given_up_s for lost in self._lost), default=math.inf)
        if given_up_s < math.inf or self._under_way:
            return max(given_up_s, self._heard_s)
        if self._again and self._out() < int(self.window):
            return max(self._sent_s, self._heard_s)  # what was sent before them was lost too
        if len(self._lost) > 1 or self._lost[0].number < self._n_handed - 1:
            return self._sent_s + min(2 * (self._srtt_s or _NO_ROUND_TRIP_S), self.timeout_s)
        return self._sent_s + self.timeout_s

    def _timer_ran_out(self, now_s: float) -> None:
        suspected = [lost for lost in self._lost if lost.given_up_s <= now_s]
        if suspected or not (self._again and self._out() < int(self.window)):
            self._give_up(suspected or list(self._lost))
        self._pump(now_s, 2 if suspected else 1)  # one: the probe, or the timer's

    def _sample(self, segment: _Segment) -> None:
        """One measurement of the round trip; it may end the slow start."""
        rtt_s = segment.acked_s - segment.sent_s
        self._srtt_s = rtt_s if self._srtt_s is None else self._srtt_s + (rtt_s - self._srtt_s) / 8
        self._least_rtt_s = min(self._least_rtt_s, rtt_s)
        hystart = self._hystart
        if hystart.begins(segment.number, segment.acked_s, self._n_handed):
            self._most_out = self._out() + 1
        found = hystart.found(segment.acked_s, rtt_s, self._least_rtt_s)
        if found and self._settings.hystart and hystart.low_window <= self.window < self._threshold:
            self._threshold = self.window

    def _grow(self) -> None:
        if self.window < self._threshold:
            if self.window < 2 * self._most_out:
                self.window += 1
        elif self._out() + 1 >= int(self.window):
            self.window += 1 / self.window

    def _restart(self, now_s: float) -> None:
        """Idle for longer than the timer: the window is halved for each, down to the initial one."""
        idle_s = now_s - self._sent_s
        busy = self._under_way or self._lost or self._again
        if not self._settings.slow_start_after_idle or busy or math.isinf(idle_s):
            return
        least = min(self.window, self._settings.initial_window)
        if idle_s > self.timeout_s:
            self._threshold = max(self._threshold, self.window * 3 / 4)
        while (idle_s := idle_s - self.timeout_s) > 0 and self.window > least:
            self.window = max(self.window / 2, least)
