"""A slow link that carries IP packets between two network namespaces: all of TCP is real. Needs root.

What a program at one end sends comes out at the other as the profile has it: rate, delay, jitter, a
finite queue that drops what finds it full, loss (independent or in bursts), a trace of rates. TCP's
slow start, retransmissions, timers and back-off are the kernel's own. Rates count whole IP packets,
so that TCP's payload gets at most 1448/1500 of them. Packets never overtake one another.

Faults (`faults`): a black hole drops what is sent and what is under way; a cut takes the device's
interface down, so that programs there find the network unreachable; a corrupt byte spoils a
checksum, so that the kernel drops the packet; a reset is the TCP proxy's alone.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from offramp_common.errors import ConfigError
from offramp_simulate.faults import Conditions, Fault
from offramp_simulate.links import Direction, LinkProfile
from offramp_simulate.live_faults import LiveFaults
from offramp_simulate.live_link import OF_THIS_MOMENT, counted_since
from offramp_simulate.live_shaper import LiveShaper
from offramp_simulate.netns import MTU_NBYTES, End, make_ends, remove_ends

_MIN_QUEUE_NBYTES = 3 * MTU_NBYTES
_READS_A_TURN = 64  # packets; then the other direction has its turn


@dataclass(frozen=True)
class PacketStats:
    """What went over the link since it started, and how it is now; bytes are those of IP packets."""

    state: str  # "up", "cut" or "silent"
    faults: tuple[str, ...]  # number and kind of each that is active, such as "2 delay"
    time_s: float  # since the start, the time that a trace follows
    bytes_up: int  # come out at the cloud's end
    bytes_down: int
    packets_up: int
    packets_down: int
    queued_bytes_up: int  # waiting for the link at this moment
    queued_bytes_down: int
    full_queue_up: int  # packets dropped since the queue was full
    full_queue_down: int
    lost_up: int  # packets dropped by the loss of the profile or of a fault
    lost_down: int
    blocked_up: int  # packets dropped by a black hole or a cut
    blocked_down: int
    corrupted_bytes_up: int
    corrupted_bytes_down: int

    def since(self, before: PacketStats) -> PacketStats:
        """The counters less those of an earlier snapshot; what is of this moment stays."""
        return counted_since(self, before, OF_THIS_MOMENT)


class PacketLink:
    """A link between two fresh namespaces; use it with `async with`, or `start` and `close`.

    `device` and `cloud` are its ends while it runs. `faults` is a timetable from the start on.
    ConfigError for a fault that it cannot have, and from `start` where there is no root.
    """

    def __init__(self, profile: LinkProfile, faults: Sequence[Fault] = ()) -> None:
        self.profile = profile
        self._timetable = tuple(faults)
        self._ends: tuple[End, End] | None = None
        self._is_cut = False
        for fault in faults:
            self._check(fault)

    async def start(self) -> None:
        self._ends = self.device, self.cloud = make_ends()
        self._up = PacketWay(self.profile, "up", self.device.tun_fd, self.cloud.tun_fd)
        self._down = PacketWay(self.profile, "down", self.cloud.tun_fd, self.device.tun_fd)
        self._faults = LiveFaults(self._faults_changed, reset=lambda: None)
        for fault in self._timetable:
            self._faults.inject(fault)

    async def close(self) -> None:
        """Take the link and its namespaces away. A second call does nothing."""
        if self._ends is None:
            return
        self._faults.close()
        self._up.close()
        self._down.close()
        ends, self._ends = self._ends, None
        remove_ends(ends)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def inject(self, fault: Fault) -> int:
        """Let a fault begin, now or `fault.at_s` seconds from now; returns its number for `heal`."""
        self._check(fault)
        return self._faults.inject(fault)

    def heal(self, number: int | None = None) -> None:
        """End the fault of this number (ConfigError when there was none), or all that are active."""
        self._faults.heal(number)

    def stats(self) -> PacketStats:
        """A snapshot; subtract two with `PacketStats.since`."""
        ways = {"up": self._up, "down": self._down}
        return PacketStats(
            state=self._faults.state,
            faults=self._faults.named(),
            time_s=self._up.now_s(),
            **{
                f"{name}_{direction}": count
                for direction, way in ways.items()
                for name, count in way.counts().items()
            },
        )

    def _check(self, fault: Fault) -> None:
        if fault.kind == "reset":
            raise ConfigError("fault reset: only the TCP proxy has connections to reset: use cut")
        if fault.factor is not None and math.isinf(self.profile.uplink_mbps):
            raise ConfigError(
                f"fault rate: link {self.profile.name} has no limit to multiply: give mbps"
            )

    def _faults_changed(self) -> None:
        is_cut = self._faults.state == "cut"
        for way in (self._up, self._down):
            way.apply(self._faults.conditions(way.direction), is_cut)
        if is_cut != self._is_cut:
            self._is_cut = is_cut
            self.device.set_up(not is_cut)


class PacketWay:
    """One direction: from one TUN device to the other, on the running event loop's clock."""

    def __init__(
        self, profile: LinkProfile, direction: Direction, source_fd: int, sink_fd: int
    ) -> None:
        self.direction: Direction = direction
        self._live = LiveShaper(profile, direction)
        shaper = self._live.shaper
        shaper.queue_nbytes = max(shaper.queue_nbytes, _MIN_QUEUE_NBYTES)
        self._source_fd = source_fd
        self._sink_fd = sink_fd
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._is_cut = False
        self._packets = self._nbytes = self._full_queue = self._blocked = 0
        self._loop = asyncio.get_running_loop()
        self._origin_s = self._loop.time()
        self._loop.add_reader(source_fd, self._take)

    def close(self) -> None:
        self._loop.remove_reader(self._source_fd)
        if self._timer:
            self._timer.cancel()

    def apply(self, now: Conditions, is_cut: bool) -> None:
        """Let these faults hold from now on."""
        self._live.apply(now)
        self._is_cut = is_cut
        if self._blocks():
            self._blocked += len(self._under_way)
            self._under_way.clear()
            self._live.shaper.flush()
        self._deliver()

    def counts(self) -> dict[str, int]:
        return {
            "bytes": self._nbytes,
            "packets": self._packets,
            "queued_bytes": self._live.shaper.queued_nbytes(self.now_s()),
            "full_queue": self._full_queue,
            "lost": self._live.lost_packets,
            "blocked": self._blocked,
            "corrupted_bytes": self._live.corrupted_nbytes,
        }

    def now_s(self) -> float:
        return self._loop.time() - self._origin_s

    def _blocks(self) -> bool:
        return self._is_cut or self._live.conditions.blackhole

    def _take(self) -> None:
        """Read what has been sent at this end."""
        for _ in range(_READS_A_TURN):
            try:
                packet = os.read(self._source_fd, 65536)
            except BlockingIOError:
                break
            except OSError:  # the interface is down
                break
            self._enter(packet)
        if self._timer is None:
            self._deliver()

    def _enter(self, packet: bytes) -> None:
        live = self._live
        if self._blocks():
            self._blocked += 1
            return
        passage = live.shaper.offer(len(packet), self.now_s())
        if passage is None:
            self._full_queue += 1
        elif not live.loses_packet():
            self._under_way.append((passage.arrives_s + live.conditions.delay_s, packet))

    def _deliver(self) -> None:
        """Hand over what has arrived, then wait for what comes next."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._live.conditions.stalled:
            return
        while self._under_way:
            arrives_s = self._under_way[0][0]
            if arrives_s > self.now_s():
                self._timer = self._loop.call_at(self._origin_s + arrives_s, self._deliver)
                return
            self._hand_over(self._under_way.popleft()[1])

    def _hand_over(self, packet: bytes) -> None:
        try:
            os.write(self._sink_fd, self._live.corrupt(packet))
        except OSError:  # not an IP packet any more, or the interface is down
            self._blocked += 1
            return
        self._packets += 1
        self._nbytes += len(packet)
