"""One direction of one connection through the TCP proxy: read, held back as the link does, written."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass, field

from offramp_simulate.live_link import Way


@dataclass
class _Chunk:
    """Bytes under way; of no bytes: the end of the connection."""

    data: bytes
    arrives_s: float  # on the way's clock
    losses: int = 0  # of its unluckiest segment
    sooner: asyncio.Event = field(default_factory=asyncio.Event)  # `arrives_s` was brought forward


class Stream:
    """Everything that `source` sends over `way`, its end included, to `sink`, in order."""

    def __init__(self, source: socket.socket, sink: socket.socket, way: Way) -> None:
        self._source = source
        self._sink = sink
        self._way = way
        self._chunks: asyncio.Queue[_Chunk] = asyncio.Queue(way.pending_chunks())
        self._unanswered: list[_Chunk] = []  # lost, and nothing has been sent after them

    async def carry(self) -> None:
        """Until the source has ended and all of it has arrived. OSError when an end breaks."""
        async with asyncio.TaskGroup() as ends:
            ends.create_task(self._read())
            ends.create_task(self._deliver())

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        data = b"-"
        while data:  # an empty read is the end; it crosses the link like the rest
            data = await loop.sock_recv(self._source, self._way.live.chunk_nbytes)
            await self._chunks.put(await self._send(data))
            await asyncio.sleep(0)  # a socket with much to read must not keep its turn

    async def _send(self, data: bytes) -> _Chunk:
        """On to the link; a lost segment costs the link its time again when it is sent again."""
        way, recovery = self._way, self._way.live.recovery()
        chunk = _Chunk(data, await way.admit(len(data)))
        losses, last_is_lost = way.live.losses(len(data))
        if data and self._unanswered and not last_is_lost:
            for lost in self._unanswered:
                by_ack_s = recovery.by_ack_s(chunk.arrives_s, lost.losses)
                if by_ack_s < lost.arrives_s:
                    lost.arrives_s = by_ack_s
                    lost.sooner.set()
            self._unanswered.clear()
        if losses:
            chunk.losses = losses
            arrives_s = way.send(len(data))
            if last_is_lost:
                chunk.arrives_s = recovery.by_timer_s(arrives_s, losses)
                self._unanswered.append(chunk)
            else:
                chunk.arrives_s = recovery.by_ack_s(arrives_s, losses)
        return chunk

    async def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            chunk = await self._chunks.get()
            if chunk.losses:
                await self._recovered(chunk)
            await self._way.pass_at(chunk.arrives_s)
            if not chunk.data:
                self._sink.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(self._sink, self._way.arrived(chunk.data))

    async def _recovered(self, chunk: _Chunk) -> None:
        """Wait until the chunk arrives, which something sent after it may bring forward."""
        while (left_s := chunk.arrives_s - self._way.clock.now_s()) > 0:
            chunk.sooner.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await chunk.sooner.wait()
