"""One stream for all work of a device: requests out, replies back in any order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from offramp_common.errors import CloudUnavailable
from offramp_common.wire import offload_pb2 as pb
from offramp_edge.grpc_errors import error_of, translated

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class EndedWell(CloudUnavailable):
    """The cloud ended the stream, because nothing was asked for long, and has not begun this request."""


class WorkStream:
    """One CompleteStream call: requests out, replies back in any order."""

    def __init__(self, call: Any, on_late: Callable[[], None]) -> None:
        self.ended = False
        self._call, self._on_late = call, on_late
        self._asked: dict[str, asyncio.Future[pb.StreamReply]] = {}
        # A write that is cancelled cancels the whole call in grpc.aio: only this task writes. What nobody
        # waits for any more is taken out again, so that a link that stands still holds no heap of frames.
        self._unsent: dict[str, bytes] = {}
        self._unsent_some = asyncio.Event()
        self._tasks = [asyncio.create_task(job) for job in (self._write(), self._read())]

    async def ask(self, request_id: str, request: bytes) -> pb.StreamReply:
        """Raises what ended the stream when it ends before the reply. Cancelled, it tells the cloud to
        give the work up."""
        reply: asyncio.Future[pb.StreamReply] = asyncio.get_running_loop().create_future()
        if self.ended:
            raise CloudUnavailable("the cloud closed the stream")
        self._asked[request_id] = reply
        self._send(request_id, request)
        try:
            return await reply
        except asyncio.CancelledError:
            if self._unsent.pop(request_id, None) is None:
                cancel = pb.OffloadRequest(request_id=request_id, cancel=True)
                self._send(request_id, cancel.SerializeToString())
            raise
        finally:
            del self._asked[request_id]

    async def close(self) -> None:
        self.ended = True
        self._unsent_some.set()
        # Its end ends the tasks. Were they cancelled, gRPC's core would still owe this event loop an event
        # for each, and says so on standard error where the loop is closed by then.
        self._call.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # gRPC's core keeps the connection for as long as there is a call object: not until some garbage
        # collection.
        self._call = None
        self._tasks.clear()

    def _send(self, request_id: str, message: bytes) -> None:
        self._unsent[request_id] = message
        self._unsent_some.set()

    async def _write(self) -> None:
        while not self.ended:
            await self._unsent_some.wait()
            self._unsent_some.clear()
            while self._unsent and not self.ended:
                message = self._unsent.pop(next(iter(self._unsent)))
                try:
                    await self._call.write(message)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    return  # the reader hears of it too, and tells

    async def _read(self) -> None:
        failure: Exception = CloudUnavailable("the cloud closed the stream")
        try:
            while (raw := await self._call.read()) is not _EOF:
                self._arrived(pb.StreamReply.FromString(raw))
            # A stream that ends in an error status ends like any other: the status tells.
            if (code := await self._call.code()) is grpc.StatusCode.OK:
                failure = EndedWell("the cloud ended the stream, and has not begun the request")
            else:
                failure = error_of(code, await self._call.details() or "the stream ended")
        except grpc.aio.AioRpcError as error:
            failure = translated(error)
        except DecodeError:
            # Nothing that comes over this connection can be believed any more.
            failure = CloudUnavailable(
                "the cloud's reply is no message: bytes were changed on the way"
            )
            self._call.cancel()
        except asyncio.CancelledError:
            failure = CloudUnavailable("this device closed its connection")
            raise
        finally:
            self.ended = True
            self._unsent_some.set()  # the writer ends, too
            for waiting in self._asked.values():
                if not waiting.done():
                    waiting.set_exception(failure)

    def _arrived(self, reply: pb.StreamReply) -> None:
        outcome = reply.WhichOneof("outcome")
        if outcome is None:
            return  # from a newer cloud: whoever waits for it learns by the time-out
        waiting = self._asked.get(getattr(reply, outcome).request_id)
        if waiting is None or waiting.done():
            self._on_late()
        else:
            waiting.set_result(reply)
