"""What the device believes of the network, from real transfers alone.

A transfer of b bytes that finds the uplink free takes rtt + b / goodput on the network. Both are unknown,
both wander, the goodput faster, and sizes may hardly differ; so they are tracked together by a Kalman filter
on ln(rtt) and ln(milliseconds per byte): it keeps what the last transfers say, doubts it the more the older
it is, and knows which of the two a transfer told of. Fitted to and compared on recorded traces in
benchmarks/planner/link_estimate.py (docs/decisions/0009-planner.md).

Transfers of one device share its uplink: each starts when the one before it has left. One that is overdue
tells of the link before it ends.

Plain arithmetic over a `Clock`: the simulator uses this file as it is.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass

from offramp_common.clock import Clock

_RTT_MS, _MS_PER_BYTE = 50.0, 8e-3 / 5.0  # of a link that nothing is known of: 50 ms, 5 Mbit/s
_UNKNOWN = 1.5**2  # variance of a logarithm that says "within a factor of about 4"
_RTT_WANDERS = 0.02  # variance of the logarithm a second
_RATE_WANDERS = 0.15
_LEAST_S = 0.02  # a transfer's news is never older than nothing: some wandering a transfer
_ITERATIONS = 3
_NOISE = 0.08  # relative error of one transfer's time
_JITTER_MS = 1.0  # and the part of it that does not grow with it
_SURPRISE = 2.5  # standard deviations; so late, one transfer alone is a stall, two are the link
_STALL = 4.0  # times the expected time
_KNOWN = 0.5  # the rate counts as known below this variance of its logarithm
_NEW = 0.1  # weight of the latest error
_IDLE_S = 1.0  # TCP may start slowly after such a pause ...
_FIRST_WINDOW = 14_600  # ... with so many bytes at once


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """rtt_ms       time of an empty exchange; None before the first transfer
    uplink_mbps  goodput; None where it is not known
    queue_ms     until what was sent before has left this device
    spread       typical relative error of a predicted time, lately
    age_s        since the last transfer that ended well; None when there was none
    transfers, failures, stalls   so far; a stall is an exchange that took four times what was expected
    """

    rtt_ms: float | None
    uplink_mbps: float | None
    age_s: float | None
    transfers: int
    failures: int
    queue_ms: float = 0.0
    spread: float = 0.0
    stalls: int = 0


@dataclass(slots=True, eq=False)
class Transfer:
    """One exchange in the air.

    start_s    when the uplink is free for it
    idle_s     how long the link had been silent when it was sent
    cloud_ms   what the cloud is expected to take for it
    """

    nbytes: int
    sent_s: float
    start_s: float
    idle_s: float
    cloud_ms: float


class Link:
    """Told of transfers as they happen; used from one thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._a, self._c = math.log(_RTT_MS), math.log(_MS_PER_BYTE)
        self._aa, self._ac, self._cc = _UNKNOWN, 0.0, _UNKNOWN  # their covariance
        self._in_air: deque[Transfer] = deque()  # in the order they were sent
        self._free_s = -math.inf  # when the last transfer known of had left
        self._told_s: float | None = None  # the filter's own time
        self._last_s: float | None = None
        self._surprised = False  # the last transfer took surprisingly long
        self._spread = 0.0
        self._transfers = self._failures = self._stalls = 0
        self._lock = threading.Lock()  # the event loop tells, the device's thread asks

    def sent(self, nbytes: int, cloud_ms: float = 0.0) -> Transfer:
        """An exchange begins: `nbytes` up, and `cloud_ms` are what the cloud is expected to take."""
        with self._lock:
            now_s = self._clock.now()
            start_s = max(now_s, self._departures(now_s))
            last_s = -math.inf if self._last_s is None else self._last_s
            idle_s = 0.0 if self._in_air else now_s - max(self._free_s, last_s)
            transfer = Transfer(nbytes, now_s, start_s, idle_s, cloud_ms)
            self._in_air.append(transfer)
            return transfer

    def answered(self, transfer: Transfer, cloud_ms: float) -> float:
        """It ended well, `cloud_ms` of it in the cloud; the milliseconds on the network, own queue
        included."""
        with self._lock:
            now_s = self._clock.now()
            self._departures(now_s)
            self._learn(transfer, 1000 * (now_s - transfer.start_s) - cloud_ms, now_s)
            left_s = now_s - (cloud_ms + math.exp(self._a)) / 1000
            self._free_s = max(self._free_s, transfer.start_s, left_s)
            self._gone(transfer)
            self._last_s = now_s
            self._transfers += 1
            return max(1000 * (now_s - transfer.sent_s) - cloud_ms, 0.0)

    def failed(self, transfer: Transfer | None = None) -> None:
        """An exchange had no answer. One that took longer than expected tells that much."""
        with self._lock:
            self._failures += 1
            if transfer is None:
                return
            now_s = self._clock.now()
            self._departures(now_s)
            waited_ms = 1000 * (now_s - transfer.start_s) - transfer.cloud_ms
            if waited_ms > self._expected_ms(transfer.nbytes):
                self._learn(transfer, waited_ms, now_s)
            self._gone(transfer)

    def dropped(self, transfer: Transfer) -> None:
        """Nobody waits for it any more: it tells nothing."""
        with self._lock:
            self._gone(transfer)

    def connected(self, took_ms: float) -> None:
        """A handshake, the first perhaps with all it takes to connect: two round trips or so, and all
        that is known before the first transfer."""
        with self._lock:
            if not self._transfers:
                self._a = math.log(max(took_ms / 2, _JITTER_MS))
                self._aa = 0.5

    def queue_ms(self) -> float:
        """Until what was sent before has left this device; an overdue answer is a queue as well."""
        if not self._in_air:
            return 0.0
        with self._lock:
            now_s = self._clock.now()
            return max(0.0, 1000 * (self._departures(now_s) - now_s))

    def costs(self) -> tuple[float, float]:
        """(round trip in ms, ms per byte): the best guess, known or not."""
        return math.exp(self._a), math.exp(self._c)

    @property
    def transfers(self) -> int:
        """That ended well so far."""
        return self._transfers

    @property
    def spread(self) -> float:
        """Typical relative error of a predicted time, lately."""
        return self._spread

    def age_s(self) -> float:
        """Since the last transfer that ended well; infinite when there was none."""
        last_s = self._last_s
        return math.inf if last_s is None else self._clock.now() - last_s

    def estimate(self) -> LinkEstimate:
        queue_ms = self.queue_ms()
        rtt_ms = uplink_mbps = None
        if self._transfers:
            rtt_ms = math.exp(self._a)
            if self._cc < _KNOWN:
                uplink_mbps = 8e-3 / math.exp(self._c)
        age_s = None if self._last_s is None else self.age_s()
        counts = (self._transfers, self._failures)
        return LinkEstimate(
            rtt_ms, uplink_mbps, age_s, *counts, queue_ms, self._spread, self._stalls
        )

    def _expected_ms(self, nbytes: int) -> float:
        return math.exp(self._a) + nbytes * math.exp(self._c)

    def _gone(self, transfer: Transfer) -> None:
        if transfer in self._in_air:
            self._in_air.remove(transfer)

    def _departures(self, now_s: float) -> float:
        """Brings the starts of all in the air up to date; when the last of them will have left."""
        rtt_s, s_per_byte = math.exp(self._a) / 1000, math.exp(self._c) / 1000
        free_s = self._free_s
        for transfer in self._in_air:
            transfer.start_s = max(transfer.sent_s, free_s)
            free_s = transfer.start_s + transfer.nbytes * s_per_byte
            overdue_s = now_s - (free_s + rtt_s + transfer.cloud_ms / 1000)
            if overdue_s > 0:  # what has lasted so long may last as long again
                free_s += 2 * overdue_s
        return free_s

    def _learn(self, transfer: Transfer, took_ms: float, now_s: float) -> None:
        """One step of the filter: `took_ms` is rtt + bytes / goodput, with an error."""
        self._age(now_s)
        took_ms, nbytes = max(took_ms, 0.1), transfer.nbytes
        expected_ms = self._expected_ms(nbytes)
        error = math.log(took_ms / expected_ms)
        self._spread += _NEW * (abs(math.expm1(min(error, 3.0))) - self._spread)
        self._stalls += took_ms > _STALL * expected_ms
        noise = _NOISE**2 + (_JITTER_MS / took_ms) ** 2
        if transfer.idle_s > _IDLE_S and nbytes > _FIRST_WINDOW:
            noise *= 4
        variance = self._gain(self._a, self._c, nbytes, noise)[2]
        surprise = error / math.sqrt(variance)
        if surprise > _SURPRISE and not self._surprised:  # a stall; being early is no accident
            noise += variance * (surprise / _SURPRISE - 1)
        elif abs(surprise) > _SURPRISE:  # twice in a row: the link is another one now
            self._aa = min(self._aa + 0.05, _UNKNOWN)
            self._cc = min(self._cc + 0.5, _UNKNOWN)
        self._surprised = surprise > _SURPRISE
        self._update(math.log(took_ms), nbytes, noise)

    def _update(self, told: float, nbytes: int, noise: float) -> None:
        """The logarithm of a time was told. Where it is far from what was expected the line through the
        old guess misleads: drawn anew at the new guess, three times."""
        a, c = self._a, self._c
        for _ in range(_ITERATIONS):
            h_a, h_c, variance = self._gain(a, c, nbytes, noise)
            expected = math.log(math.exp(a) + nbytes * math.exp(c))
            error = told - expected - h_a * (self._a - a) - h_c * (self._c - c)
            pa, pc = self._aa * h_a + self._ac * h_c, self._ac * h_a + self._cc * h_c
            a, c = self._a + pa / variance * error, self._c + pc / variance * error
        self._a, self._c = a, c
        self._aa -= pa * pa / variance
        self._ac -= pa * pc / variance
        self._cc -= pc * pc / variance

    def _gain(self, a: float, c: float, nbytes: int, noise: float) -> tuple[float, float, float]:
        """(how the logarithm of the time moves with a, with c; its variance)."""
        rtt_ms, rest_ms = math.exp(a), nbytes * math.exp(c)
        h_a = rtt_ms / (rtt_ms + rest_ms)
        h_c = 1 - h_a
        spread = h_a * (self._aa * h_a + 2 * self._ac * h_c) + self._cc * h_c * h_c
        return h_a, h_c, spread + noise

    def _age(self, now_s: float) -> None:
        """What was learnt before counts less."""
        since_s = _LEAST_S if self._told_s is None else max(now_s - self._told_s, _LEAST_S)
        self._told_s = now_s
        self._aa = min(self._aa + _RTT_WANDERS * since_s, _UNKNOWN)
        self._cc = min(self._cc + _RATE_WANDERS * since_s, _UNKNOWN)
