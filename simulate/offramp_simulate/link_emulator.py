"""A slow link between two processes of one machine: a TCP proxy that shapes what it passes on.

It listens on an address, connects to a target for each connection it accepts, and shapes both
directions. All connections share each direction's rate and queue: one emulator is one link.

Emulated: the rate at which bytes leave, in turns of a chunk for each connection that has data; a
bounded queue, and back-pressure when it is full (the emulator stops reading, so the sender's
buffers fill); the delay; a round trip for a new connection before its first byte, since no SYN goes
through a proxy; a trace of rates; a cut and a dead radio.

Not emulated: loss, and with it TCP's reaction: no slow start, no retransmission and no back-off
after an outage; the time that headers and bare ACKs take (an estimate of their bytes is reported
apart). A connection succeeds locally at once even where the target will refuse it: it is then
closed. Timers wake late, each way, by up to a millisecond in asyncio's usual event loop and less in
`live_link.precise_loop`: delays are that much longer, rates are not affected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from functools import partial
from types import TracebackType
from typing import Self

from offramp_common.errors import ConfigError
from offramp_simulate.links import LinkProfile
from offramp_simulate.live_link import LinkClock, LinkStats, Way

_log = logging.getLogger(__name__)

Address = tuple[str, int]


class LinkEmulator:
    """One link in front of `target`; use it with `async with`, or `start` and `close`.

    `listen` is the address to accept on, port 0 for any free one; `address` is then the one it got.
    ConfigError from `start` when it cannot be bound.
    """

    def __init__(
        self, profile: LinkProfile, target: Address, listen: Address = ("127.0.0.1", 0)
    ) -> None:
        self.profile = profile
        self.target = target
        self._listen = listen
        self._state = "up"
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
        self._clock = LinkClock()
        self._up = Way(self.profile, "up", self._clock)
        self._down = Way(self.profile, "down", self._clock)
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Reset all connections and stop listening. A second call does nothing."""
        if self._accepting is None:
            return
        self._accepting.cancel()
        self._drop_all()
        self._clock.go_on()  # or what waits on a silent link would wait for ever
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

    def cut(self, *, silent: bool = False) -> None:
        """Break the link until `restore`.

        Plainly: every connection is reset, and new ones are as soon as they are made (the port
        stays bound, so that nobody takes it meanwhile). Silent, as a dead radio: connections stay
        open and nothing comes through, not even the news that an end has closed; a new connection
        succeeds locally and then waits. A silent link's time stands still, its trace's too: what
        was under way comes out after `restore`, without TCP's back-off.
        """
        if silent:
            self._state = "silent"
            self._clock.stop()
            return
        self._state = "cut"
        self._drop_all()
        self._up.shaper.flush()
        self._down.shaper.flush()
        self._clock.go_on()

    def restore(self) -> None:
        """Undo `cut`."""
        self._state = "up"
        self._clock.go_on()

    def stats(self) -> LinkStats:
        """A snapshot; subtract two with `LinkStats.since`."""
        now_s = self._clock.now_s()
        return LinkStats(
            state=self._state,
            bytes_up=self._up.arrived_nbytes,
            bytes_down=self._down.arrived_nbytes,
            header_bytes_up=self._up.header_nbytes,
            header_bytes_down=self._down.header_nbytes,
            queued_bytes_up=self._up.shaper.queued_nbytes(now_s),
            queued_bytes_down=self._down.shaper.queued_nbytes(now_s),
            connections=self._n_accepted,
            open_connections=len(self._connections),
        )

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
            if self._state == "cut":
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
            target = await _connect(self.target)
            await self._cross(self._down)  # SYN and ACK: from here on the client may send
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(client, target, self._up))
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
        await self._clock.sleep_until(way.shaper.send(0, self._clock.now_s()).arrives_s)

    async def _carry_back(self, target: socket.socket, client: socket.socket) -> None:
        await self._cross(self._up)  # the ACK without which the target would not know its caller
        await self._carry(target, client, self._down)

    async def _carry(self, source: socket.socket, sink: socket.socket, way: Way) -> None:
        """Everything that `source` sends, its end included, to `sink`."""
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(way.pending_chunks(self.profile))
        async with asyncio.TaskGroup() as ends:
            ends.create_task(self._read(source, way, chunks))
            ends.create_task(self._deliver(sink, way, chunks))

    async def _read(
        self, source: socket.socket, way: Way, chunks: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        loop = asyncio.get_running_loop()
        data = b"-"
        while data:  # an empty read is the end; it crosses the link like the rest
            data = await loop.sock_recv(source, way.chunk_nbytes)
            await chunks.put((await way.admit(len(data)), data))
            await asyncio.sleep(0)  # a socket with much to read must not keep its turn

    async def _deliver(
        self, sink: socket.socket, way: Way, chunks: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            arrives_s, data = await chunks.get()
            await self._clock.sleep_until(arrives_s)
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            way.arrived(len(data))
            await loop.sock_sendall(sink, data)


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
