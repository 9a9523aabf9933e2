"""A link in real time: its clock, its two directions and what it counts."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import selectors
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

from offramp_simulate.faults import Conditions
from offramp_simulate.links import Direction, LinkProfile, header_nbytes
from offramp_simulate.live_shaper import LiveShaper

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

OF_THIS_MOMENT = ("state", "faults", "time_s", "queued_bytes_up", "queued_bytes_down")
"""Fields of a link's statistics that are no counters."""
_WAKE_LATE_S = 0.05  # how late a busy machine may wake us, for sizing only
_MIN_PENDING_CHUNKS = 256  # small messages count as chunks too; they must not wait for this
_UNLIMITED_PENDING_CHUNKS = 32


@dataclass(frozen=True)
class LinkStats:
    """What went over the link since it started, and how it is now."""

    state: str  # "up", "cut" or "silent"
    faults: tuple[str, ...]  # number and kind of each that is active, such as "2 delay"
    time_s: float  # on the link's own clock, which a trace follows, since the start
    bytes_up: int  # payload of TCP that has come out at the target's end
    bytes_down: int  # payload of TCP that has come out at the device's end
    header_bytes_up: int  # estimate of IPv4 and TCP headers of those bytes, full segments, no ACKs
    header_bytes_down: int
    queued_bytes_up: int  # waiting for the link at this moment
    queued_bytes_down: int
    lost_segments_up: int  # modelled losses: each made its connection wait
    lost_segments_down: int
    corrupted_bytes_up: int
    corrupted_bytes_down: int
    connections: int  # accepted, whether or not the target then was
    open_connections: int  # at this moment

    def since(self, before: LinkStats) -> LinkStats:
        """The counters less those of an earlier snapshot; what is of this moment stays."""
        return counted_since(self, before, (*OF_THIS_MOMENT, "open_connections"))


def counted_since(now: S, before: S, kept: Collection[str]) -> S:
    """A snapshot's fields less those of an earlier one, but for the `kept`."""
    names = [field.name for field in fields(now) if field.name not in kept]
    return replace(now, **{name: getattr(now, name) - getattr(before, name) for name in names})


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

    def __init__(self, profile: LinkProfile, direction: Direction) -> None:
        self.live = LiveShaper(profile, direction)
        self.clock = LinkClock()
        self.arrived_nbytes = 0
        self.header_nbytes = 0
        self._flows = asyncio.Event()  # cleared while the link is stalled
        self._flows.set()
        self._turn = asyncio.Lock()  # first come, first served: connections take turns

    def apply(self, now: Conditions) -> None:
        """Let these faults hold from now on."""
        self.live.apply(now)
        if now.stalled:
            self._flows.clear()
        else:
            self._flows.set()
        if now.blackhole:
            self.clock.stop()
        else:
            self.clock.go_on()

    def pending_chunks(self) -> int:
        """How many chunks of one connection may be between its two sockets.

        Enough never to limit the rate: the queue, what is under way, and a late wake-up. Bounded
        all the same, since a receiver may stop reading.
        """
        shaper, profile = self.live.shaper, self.live.profile
        peak_mbps = shaper.rate.peak_mbps
        if math.isinf(peak_mbps):
            return _UNLIMITED_PENDING_CHUNKS
        under_way_s = (profile.rtt_ms / 2 + profile.jitter_ms) / 1e3
        under_way_s += self.live.conditions.delay_s + _WAKE_LATE_S
        nbytes = shaper.queue_nbytes + peak_mbps * 1e6 / 8 * under_way_s
        return max(_MIN_PENDING_CHUNKS, math.ceil(nbytes / self.live.chunk_nbytes))

    async def admit(self, nbytes: int) -> float:
        """Wait for room in the queue; returns when the bytes arrive, on the clock."""
        async with self._turn:
            await self.clock.sleep_until(self.live.shaper.room_s(nbytes, self.clock.now_s()))
            return self.send(nbytes)

    def send(self, nbytes: int) -> float:
        """As `admit`, whether or not there is room."""
        return self.live.send(nbytes, self.clock.now_s()).arrives_s

    def queued_nbytes(self) -> int:
        return self.live.shaper.queued_nbytes(self.clock.now_s())

    async def pass_at(self, arrives_s: float) -> None:
        """Wait until then, and on while the link is stalled."""
        await self.clock.sleep_until(arrives_s)
        await self._flows.wait()

    def arrived(self, data: bytes) -> bytes:
        """Count what comes out of the link; returns it as it comes out."""
        self.arrived_nbytes += len(data)
        self.header_nbytes += header_nbytes(len(data))
        return self.live.corrupt(data)


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


def keep_time() -> None:
    """Real-time priority where it is allowed: on a busy machine timers would wake milliseconds late.

    The kernel leaves others a share of the core even then; what this process starts does without.
    """
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or not root
        policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
