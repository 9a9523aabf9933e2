"""Links: how fast, how far, how long a queue; and when a byte that enters one comes out.

Nothing here waits or reads a clock: times are seconds from an arbitrary start, given by the caller.
The emulator calls a `Shaper` with real time, the simulator with virtual time. Rates count the
payload of TCP (what an application sends), in Mbit/s of 10**6 bit; headers are not subtracted.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from offramp_common.errors import ConfigError
from offramp_simulate.loss import GilbertElliott
from offramp_simulate.traces import RateTrace

Direction = Literal["up", "down"]  # up: device to cloud

SEGMENT_NBYTES = 1460  # payload of a full TCP segment on Ethernet
HEADER_NBYTES = 40  # IPv4 and TCP without options, of each segment
# A chunk is what one connection puts on the link in its turn. About this long on the link, so that
# concurrent connections interleave; but few enough a second for an event loop in Python.
_CHUNK_MS = 2.0
_MAX_CHUNK_SEGMENTS = 8
_UNLIMITED_CHUNK_NBYTES = 65536


class Rate(Protocol):
    """Mbit/s over time."""

    @property
    def mean_mbps(self) -> float: ...
    @property
    def peak_mbps(self) -> float: ...
    def finish_s(self, start_s: float, nbytes: int) -> float:
        """When the last of `nbytes` that start at `start_s` has been put on the link, seconds."""
        ...

    def scaled(self, factor: float) -> Rate:
        """The same course, every rate times `factor`."""
        ...


@dataclass(frozen=True)
class ConstantRate:
    """The same rate for ever; infinity means that bytes take no time."""

    mbps: float

    @property
    def mean_mbps(self) -> float:
        return self.mbps

    @property
    def peak_mbps(self) -> float:
        return self.mbps

    def finish_s(self, start_s: float, nbytes: int) -> float:
        return start_s + nbytes * 8 / (self.mbps * 1e6)

    def scaled(self, factor: float) -> ConstantRate:
        return ConstantRate(self.mbps * factor)


class Shifted:
    """A rate whose time runs ahead."""

    def __init__(self, rate: Rate, by_s: float) -> None:
        self._rate, self._by_s = rate, by_s

    @property
    def mean_mbps(self) -> float:
        return self._rate.mean_mbps

    @property
    def peak_mbps(self) -> float:
        return self._rate.peak_mbps

    def finish_s(self, start_s: float, nbytes: int) -> float:
        return self._rate.finish_s(start_s + self._by_s, nbytes) - self._by_s

    def scaled(self, factor: float) -> Rate:
        return Shifted(self._rate.scaled(factor), self._by_s)


@dataclass(frozen=True)
class LinkProfile:
    """One link, both directions. ConfigError when a value is out of range."""

    name: str
    uplink_mbps: float  # device to cloud, Mbit/s of payload; infinity: not limited
    downlink_mbps: float  # cloud to device, Mbit/s of payload
    rtt_ms: float  # round trip without queueing; each direction delays by half
    queue_ms: float = 100.0  # what may wait in each direction, as time at its mean rate
    jitter_ms: float = 0.0  # extra one-way delay of a chunk, uniform in [0, jitter_ms]; keeps order
    seed: int = 0  # of the jitter
    trace: RateTrace | None = None  # varies the rates; the two above are then its means
    downlink_trace: RateTrace | None = None  # of the downlink, where it does not follow `trace`
    loss: GilbertElliott | None = None  # of packets, in each direction; drawn with the seed too

    def __post_init__(self) -> None:
        for field in ("uplink_mbps", "downlink_mbps", "queue_ms"):
            value = getattr(self, field)
            if not value > 0:
                raise ConfigError(f"link {self.name}: {field} is {value}: give more than 0")
        for field in ("rtt_ms", "jitter_ms"):
            value = getattr(self, field)
            if not (0 <= value < math.inf):
                raise ConfigError(f"link {self.name}: {field} is {value}: give 0 or more, finite")

    @classmethod
    def from_trace(
        cls,
        trace: RateTrace,
        *,
        rtt_ms: float,
        uplink_factor: float = 1.0,
        downlink_factor: float = 1.0,
    ) -> LinkProfile:
        """A link that follows `trace` in both directions, each times a factor.

        Few traces were recorded upwards: for one of a downlink an `uplink_factor` below 1 is apt.
        """
        for name, factor in (("uplink", uplink_factor), ("downlink", downlink_factor)):
            if not 0 < factor < math.inf:
                raise ConfigError(
                    f"link {trace.name}: {name}_factor is {factor}: give more than 0, finite"
                )
        mean = trace.mean_mbps
        return cls(trace.name, mean * uplink_factor, mean * downlink_factor, rtt_ms, trace=trace)

    def trace_of(self, direction: Direction) -> RateTrace | None:
        """At this direction's rates; None where they are constant."""
        mbps, trace = self.uplink_mbps, self.trace
        if direction == "down":
            mbps, trace = self.downlink_mbps, self.downlink_trace or self.trace
        return None if trace is None else trace.scaled(mbps / trace.mean_mbps)

    def rate(self, direction: Direction) -> Rate:
        mbps = self.uplink_mbps if direction == "up" else self.downlink_mbps
        return self.trace_of(direction) or ConstantRate(mbps)

    def chunk_nbytes(self, direction: Direction) -> int:
        """How much one connection puts on the link in its turn: whole segments, about 2 ms."""
        return chunk_nbytes(self.rate(direction).mean_mbps)

    def shaper(self, direction: Direction) -> Shaper:
        """A fresh shaper of one direction, its queue at least two chunks long."""
        rate = self.rate(direction)
        queue_nbytes = self.queue_ms * rate.mean_mbps * 1e3 / 8
        return Shaper(
            rate,
            delay_s=self.rtt_ms / 2e3,
            queue_nbytes=max(queue_nbytes, 2 * self.chunk_nbytes(direction)),
            jitter_s=self.jitter_ms / 1e3,
            seed=self.seed_of(direction),
        )

    def seed_of(self, direction: Direction) -> int:
        """Two directions of one link must not draw the same jitter and losses."""
        return 2 * self.seed + (direction == "down")


def chunk_nbytes(mean_mbps: float) -> int:
    """Whole segments, about 2 ms of them at this rate."""
    if math.isinf(mean_mbps):
        return _UNLIMITED_CHUNK_NBYTES
    segments = int(mean_mbps * _CHUNK_MS * 1e3 / 8 / SEGMENT_NBYTES)
    return SEGMENT_NBYTES * min(max(segments, 1), _MAX_CHUNK_SEGMENTS)


class Passage(NamedTuple):
    """When a chunk has left the queue and when it reaches the far end, seconds."""

    departs_s: float
    arrives_s: float


class Shaper:
    """One direction of a link: a bounded queue, a rate, then a delay.

    A chunk departs at max(now, departure of the one before) + its time at the link's rate, and
    arrives `delay_s` (and jitter) later. Chunks under way do not hold up those behind them, so the
    delay does not limit the rate. What arrives keeps the order of what was sent.
    """

    def __init__(
        self,
        rate: Rate,
        *,
        delay_s: float = 0.0,
        queue_nbytes: float = math.inf,
        jitter_s: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.rate = rate
        self.queue_nbytes = queue_nbytes
        self._delay_s = delay_s
        self._jitter_s = jitter_s
        self._random = random.Random(seed)
        self._waiting: deque[tuple[float, int]] = deque()  # (departs_s, nbytes), in order
        self._queued_nbytes = 0
        self._last = Passage(-math.inf, -math.inf)

    def queued_nbytes(self, now_s: float) -> int:
        """Bytes in the queue, the chunk that is being put on the link included in whole."""
        while self._waiting and self._waiting[0][0] <= now_s:
            self._queued_nbytes -= self._waiting.popleft()[1]
        return self._queued_nbytes

    def room_s(self, nbytes: int, now_s: float) -> float:
        """The first time from `now_s` on at which the queue has room for `nbytes`.

        A chunk larger than the whole queue has room when the queue is empty.
        """
        queued = self.queued_nbytes(now_s)
        room_s = now_s
        for departs_s, gone in self._waiting:
            if queued + nbytes <= self.queue_nbytes:
                break
            queued -= gone
            room_s = departs_s
        return room_s

    def send(self, nbytes: int, now_s: float) -> Passage:
        """Put a chunk into the queue at `now_s`, which must not go back between calls.

        The bound of the queue is the caller's to keep: ask `room_s` first. Zero bytes (the opening
        and the end of a connection) wait their turn and take no time on the link.
        """
        self.queued_nbytes(now_s)  # for a caller who only sends: forget what has departed
        departs_s = self.rate.finish_s(max(now_s, self._last.departs_s), nbytes)
        jitter_s = self._random.uniform(0, self._jitter_s) if self._jitter_s else 0.0
        arrives_s = max(departs_s + self._delay_s + jitter_s, self._last.arrives_s)
        self._waiting.append((departs_s, nbytes))
        self._queued_nbytes += nbytes
        self._last = Passage(departs_s, arrives_s)
        return self._last

    def offer(self, nbytes: int, now_s: float) -> Passage | None:
        """As `send`, but None, and nothing happens, where the queue has no room: drop-tail.

        A packet larger than the whole queue has room when the queue is empty.
        """
        queued = self.queued_nbytes(now_s)
        if queued and queued + nbytes > self.queue_nbytes:
            return None
        return self.send(nbytes, now_s)

    def flush(self) -> None:
        """Forget what is queued or under way: the link was cut."""
        self._waiting.clear()
        self._queued_nbytes = 0
        self._last = Passage(-math.inf, -math.inf)


def header_nbytes(nbytes: int) -> int:
    """Header bytes of the segments that carry `nbytes` of payload, an estimate (no bare ACKs)."""
    return -(-nbytes // SEGMENT_NBYTES) * HEADER_NBYTES


DEFAULT_PROFILE = "lte"

# Round figures of ours, not measurements: each stands for a class of link to a near cloud region.
# For comparison, published medians, round trip / up / down:
# - US speed tests of 2021 (artifact of Narayanan et al., SIGCOMM 2021; servers at any distance):
#   LTE 89 ms / 31 / 117; 5G low-band 58 ms / 73 / 118; 5G mmWave 52 ms / 77 / 944;
#   5G low-band to servers within 50 km (77 tests): 16 ms / 67 / 127. Our lte is a loaded cell.
# - Geostationary home service (Ookla, third quarter of 2021): about 600-700 ms / 3 / 19.
# - 3G on the move (Riiser et al., MMSys 2013): 1.3 down on average.
PROFILES: dict[str, LinkProfile] = {
    profile.name: profile
    for profile in (
        # name, up and down in Mbit/s, round trip in ms
        LinkProfile("3g", 1.0, 3.0, 100.0),
        LinkProfile("lte", 5.0, 20.0, 40.0),
        LinkProfile("5g", 60.0, 300.0, 15.0),
        LinkProfile("wifi", 50.0, 100.0, 5.0),
        LinkProfile("broadband", 10.0, 100.0, 20.0),
        LinkProfile("satellite", 3.0, 50.0, 600.0),
        LinkProfile("unshaped", math.inf, math.inf, 0.0),
    )
}
