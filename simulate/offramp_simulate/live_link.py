"""A link in real time: its clock, its two directions and what it counts."""

from __future__ import annotations

import asyncio
import math
import select
import selectors
from dataclasses import dataclass, fields

from offramp_simulate.links import Direction, LinkProfile, header_nbytes

_WAKE_LATE_S = 0.05  # how late a busy machine may wake us, for sizing only
_MIN_PENDING_CHUNKS = 256  # small messages count as chunks too; they must not wait for this
_UNLIMITED_PENDING_CHUNKS = 32


@dataclass(frozen=True)
class LinkStats:
    """What went over the link since it started, and how it is now."""

    state: str  # "up", "cut" or "silent"
    bytes_up: int  # payload of TCP that has come out at the target's end
    bytes_down: int  # payload of TCP that has come out at the device's end
    header_bytes_up: int  # estimate of IPv4 and TCP headers of those bytes, full segments, no ACKs
    header_bytes_down: int
    queued_bytes_up: int  # waiting for the link at this moment
    queued_bytes_down: int
    connections: int  # accepted, whether or not the target then was
    open_connections: int  # at this moment

    def since(self, before: LinkStats) -> LinkStats:
        """The counters less those of an earlier snapshot; what is of this moment stays."""
        now_only = ("state", "queued_bytes_up", "queued_bytes_down", "open_connections")
        counts = [f.name for f in fields(self) if f.name not in now_only]
        changed = {name: getattr(self, name) - getattr(before, name) for name in counts}
        return LinkStats(**{name: getattr(self, name) for name in now_only}, **changed)


class LinkClock:
    """Seconds of the link's own time: the event loop's, less the time it stood still."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._origin_s = self._loop.time()
        self._stopped_s: float | None = None
        self._runs = asyncio.Event()
        self._runs.set()

    def now_s(self) -> float:
        return (self._loop.time() if self._stopped_s is None else self._stopped_s) - self._origin_s

    def stop(self) -> None:
        if self._stopped_s is None:
            self._stopped_s = self._loop.time()
            self._runs.clear()

    def go_on(self) -> None:
        if self._stopped_s is not None:
            self._origin_s += self._loop.time() - self._stopped_s
            self._stopped_s = None
            self._runs.set()

    async def sleep_until(self, when_s: float) -> None:
        while True:
            await self._runs.wait()
            left_s = when_s - self.now_s()
            if left_s <= 0:
                return
            await asyncio.sleep(left_s)


class Way:
    """One direction of the link, shared by all connections."""

    def __init__(self, profile: LinkProfile, direction: Direction, clock: LinkClock) -> None:
        self.shaper = profile.shaper(direction)
        self.chunk_nbytes = profile.chunk_nbytes(direction)
        self.arrived_nbytes = 0
        self.header_nbytes = 0
        self._clock = clock
        self._turn = asyncio.Lock()  # first come, first served: connections take turns

    def pending_chunks(self, profile: LinkProfile) -> int:
        """How many chunks of one connection may be between its two sockets.

        Enough never to limit the rate: the queue, what is under way, and a late wake-up. Bounded
        all the same, since a receiver may stop reading.
        """
        peak_mbps = self.shaper.rate.peak_mbps
        if math.isinf(peak_mbps):
            return _UNLIMITED_PENDING_CHUNKS
        under_way_s = (profile.rtt_ms / 2 + profile.jitter_ms) / 1e3 + _WAKE_LATE_S
        nbytes = self.shaper.queue_nbytes + peak_mbps * 1e6 / 8 * under_way_s
        return max(_MIN_PENDING_CHUNKS, math.ceil(nbytes / self.chunk_nbytes))

    async def admit(self, nbytes: int) -> float:
        """Wait for room in the queue; returns when the bytes arrive, on the link's clock."""
        async with self._turn:
            await self._clock.sleep_until(self.shaper.room_s(nbytes, self._clock.now_s()))
            return self.shaper.send(nbytes, self._clock.now_s()).arrives_s

    def arrived(self, nbytes: int) -> None:
        self.arrived_nbytes += nbytes
        self.header_nbytes += header_nbytes(nbytes)


def precise_loop() -> asyncio.AbstractEventLoop:
    """An event loop whose timers wake within about 0.1 ms, for `asyncio.Runner(loop_factory=...)`.

    On Linux asyncio's usual loop rounds each wait up to a whole millisecond, since epoll takes no
    less; both ways of a link add up, which matters where the round trip is 5 ms.
    """
    if not hasattr(selectors, "EpollSelector"):
        return asyncio.SelectorEventLoop()

    class PreciseSelector(selectors.EpollSelector):
        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            # The epoll set is itself a descriptor to wait for, and select(2) counts microseconds.
            if timeout is None or timeout > 0:
                select.select([self.fileno()], [], [], timeout)
            return super().select(0)

    return asyncio.SelectorEventLoop(PreciseSelector())
