"""A slow link between two processes of one machine: a TCP proxy that shapes what it passes on.

It listens on an address, connects to a target for each connection it accepts, and shapes both
directions. All connections share each direction's rate and queue: one emulator is one link.

Emulated: the rate at which bytes leave, in turns of a chunk for each connection that has data; a
bounded queue, and back-pressure when it is full (the emulator stops reading, so the sender's
buffers fill); the delay; a round trip for a new connection before its first byte, since no SYN goes
through a proxy; a trace of rates; faults (`faults`), by a timetable or on command. Loss is a model:
bytes of a lost segment, and what is behind them on their connection, come as late as TCP would have
them (`loss`).

Not emulated: TCP's pace: no slow start, no slowing down after a loss and no back-off after an
outage; the time that headers and bare ACKs take (an estimate of their bytes is reported apart). A
connection succeeds locally at once even where the target will refuse it: it is then closed. Timers
wake late, each way, by up to a millisecond in asyncio's usual event loop and less in
`live_link.precise_loop`: delays are that much longer, rates are not affected. For all of TCP there
is the layer-3 link (`layer3`), which needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import struct
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Self

from offramp_common.errors import ConfigError
from offramp_simulate.faults import Conditions, Fault
from offramp_simulate.links import LinkProfile
from offramp_simulate.live_faults import LiveFaults
from offramp_simulate.live_link import LinkStats, Way
from offramp_simulate.live_stream import Stream
from offramp_simulate.loss import SYN_TIMEOUT_S

_log = logging.getLogger(__name__)

Address = tuple[str, int]


class LinkEmulator:
    """One link in front of `target`; use it with `async with`, or `start` and `close`.

    `listen` is the address to accept on, port 0 for any free one; `address` is then the one it got.
    `faults` is a timetable from the start on; more can be given by `inject`. ConfigError for a
    fault that this link cannot have, and from `start` when the address cannot be bound.
    """

    def __init__(
        self,
        profile: LinkProfile,
        target: Address,
        listen: Address = ("127.0.0.1", 0),
        faults: Sequence[Fault] = (),
    ) -> None:
        self.profile = profile
        self.target = target
        self._timetable = tuple(faults)
        for fault in faults:
            self._check(fault)
        self._listen = listen
        self._connections: set[asyncio.Task[None]] = set()
        self._n_accepted = 0
        self._accepting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        host, port = self._listen
        try:
            self._listener = socket.create_server((host, port), family=_family(host), backlog=128)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error}): give a free port, or 0 for any"
            ) from error
        self._listener.setblocking(False)
        self.address: Address = self._listener.getsockname()[:2]
        self._up = Way(self.profile, "up")
        self._down = Way(self.profile, "down")
        self._faults = LiveFaults(self._faults_changed, self._drop_all)
        for fault in self._timetable:
            self._faults.inject(fault)
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Reset all connections and stop listening. A second call does nothing."""
        if self._accepting is None:
            return
        self._accepting.cancel()
        self._faults.close()
        self._drop_all()
        for way in (self._up, self._down):
            way.apply(Conditions())  # or what waits on a silent link would wait for ever
        await asyncio.gather(self._accepting, *self._connections, return_exceptions=True)
        self._listener.close()

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
        """Let a fault begin, now or `fault.at_s` seconds from now; returns its number for `heal`.

        ConfigError where the link has no bandwidth limit that a factor could apply to.
        """
        self._check(fault)
        return self._faults.inject(fault)

    def _check(self, fault: Fault) -> None:
        if fault.factor is not None and math.isinf(self.profile.uplink_mbps):
            raise ConfigError(
                f"fault rate: link {self.profile.name} has no limit to multiply: give mbps"
            )

    def heal(self, number: int | None = None) -> None:
        """End the fault of this number (ConfigError when there was none), or all that are active."""
        self._faults.heal(number)

    def cut(self, *, silent: bool = False) -> None:
        """Break the link until `restore`.

        Plainly: every connection is reset, and new ones are as soon as they are made (the port
        stays bound, so that nobody takes it meanwhile). Silent, as a dead radio: connections stay
        open and nothing comes through, not even the news that an end has closed; a new connection
        succeeds locally and then waits. A silent link's time stands still, its trace's too: what
        was under way comes out after `restore`, without TCP's back-off.
        """
        self.inject(Fault("blackhole" if silent else "cut"))

    def restore(self) -> None:
        """End all faults that are active, a `cut` among them; what a timetable has yet to come stays."""
        self.heal()

    def stats(self) -> LinkStats:
        """A snapshot; subtract two with `LinkStats.since`."""
        up, down = self._up, self._down
        return LinkStats(
            state=self._faults.state,
            faults=self._faults.named(),
            time_s=up.clock.now_s(),
            bytes_up=up.arrived_nbytes,
            bytes_down=down.arrived_nbytes,
            header_bytes_up=up.header_nbytes,
            header_bytes_down=down.header_nbytes,
            queued_bytes_up=up.queued_nbytes(),
            queued_bytes_down=down.queued_nbytes(),
            lost_segments_up=up.live.lost_packets,
            lost_segments_down=down.live.lost_packets,
            corrupted_bytes_up=up.live.corrupted_nbytes,
            corrupted_bytes_down=down.live.corrupted_nbytes,
            connections=self._n_accepted,
            open_connections=len(self._connections),
        )

    def _faults_changed(self) -> None:
        if self._faults.state == "cut":
            self._drop_all()
            self._up.live.shaper.flush()
            self._down.live.shaper.flush()
        self._up.apply(self._faults.conditions("up"))
        self._down.apply(self._faults.conditions("down"))

    def _drop_all(self) -> None:
        for task in self._connections:
            task.cancel()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # out of descriptors, or the client left before we came
                _log.warning("link: cannot accept a connection: %s", error)
                await asyncio.sleep(0.1)
                continue
            _prepare(client)
            self._n_accepted += 1
            if self._faults.state == "cut":
                _close(client, reset=True)
                continue
            task = asyncio.create_task(self._serve(client))
            self._connections.add(task)
            task.add_done_callback(partial(self._forget, client))

    def _forget(self, client: socket.socket, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        client.close()  # a task that is cancelled before its first step has not done it

    async def _serve(self, client: socket.socket) -> None:
        """One connection from its opening to its end, packet by packet as TCP would."""
        clean, target = False, None
        try:
            await self._cross(self._up)  # SYN
            losses, _ = self._up.live.losses(1)
            await asyncio.sleep(SYN_TIMEOUT_S * (2**losses - 1))
            target = await _connect(self.target)
            await self._cross(self._down)  # SYN and ACK: from here on the client may send
            async with asyncio.TaskGroup() as both:
                both.create_task(Stream(client, target, self._up).carry())
                both.create_task(self._carry_back(target, client))
            clean = True
        except* OSError as broken:
            _log.debug("link: a connection broke: %s", broken.exceptions)
            await self._cross(self._down)  # so long until the other end hears of it
        finally:
            for end in (client, target):
                if end is not None:
                    _close(end, reset=not clean)

    async def _cross(self, way: Way) -> None:
        """A packet without payload crosses the link."""
        await way.pass_at(way.send(0))

    async def _carry_back(self, target: socket.socket, client: socket.socket) -> None:
        await self._cross(self._up)  # the ACK without which the target would not know its caller
        await Stream(target, client, self._down).carry()


async def _connect(address: Address) -> socket.socket:
    """A socket connected to the target; OSError when it refuses. Names are looked up in IPv4."""
    end = socket.socket(_family(address[0]), socket.SOCK_STREAM)
    try:
        _prepare(end)
        await asyncio.get_running_loop().sock_connect(end, address)
    except BaseException as error:
        end.close()
        if isinstance(error, OSError):
            _log.warning("link: cannot reach the target %s:%s: %s", *address, error)
        raise
    return end


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _prepare(end: socket.socket) -> None:
    end.setblocking(False)
    # Pacing is ours: the kernel must not hold a small chunk back until an ACK comes.
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _close(end: socket.socket, *, reset: bool) -> None:
    if reset:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
