"""Work over gRPC: the one place that knows gRPC's calls, options and status codes.

All work of one device goes over one long-lived stream, matched by request id: beside a call for each
that saves a third of the bytes around a message and about a tenth of the device's CPU
(benchmarks/unary_or_stream.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from offramp_common.errors import (
    BundleMismatch,
    CloudBusy,
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    OfframpError,
    RequestError,
)
from offramp_common.messages import completion_from_pb, hello_to_pb, offload_to_pb, welcome_from_pb
from offramp_common.transport import Completion, Hello, Offload, Welcome
from offramp_common.wire import offload_pb2 as pb
from offramp_common.wire import offload_pb2_grpc as pb_grpc

_ERRORS: Mapping[grpc.StatusCode, type[OfframpError]] = {
    grpc.StatusCode.CANCELLED: CloudUnavailable,
    grpc.StatusCode.UNKNOWN: CloudUnavailable,
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: BundleMismatch,
    grpc.StatusCode.ALREADY_EXISTS: RequestError,
    grpc.StatusCode.PERMISSION_DENIED: ConfigError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: CloudBusy,
    grpc.StatusCode.FAILED_PRECONDITION: BundleMismatch,
    grpc.StatusCode.ABORTED: CloudUnavailable,
    grpc.StatusCode.OUT_OF_RANGE: RequestError,
    grpc.StatusCode.UNIMPLEMENTED: ConfigError,
    grpc.StatusCode.INTERNAL: CloudUnavailable,
    grpc.StatusCode.UNAVAILABLE: CloudUnavailable,
    grpc.StatusCode.DATA_LOSS: CloudUnavailable,
    grpc.StatusCode.UNAUTHENTICATED: ConfigError,
}
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_KEEPALIVE_S = 20.0
_KEEPALIVE_TIMEOUT_S = 10.0  # pings queue behind frames on a slow link
_OPTIONS = (
    ("grpc.keepalive_timeout_ms", int(1000 * _KEEPALIVE_TIMEOUT_S)),
    # Of the pings that measure the connection: while one is out, no other is sent.
    ("grpc.http2.ping_timeout_ms", int(1000 * _KEEPALIVE_TIMEOUT_S)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The breaker decides when to try again; gRPC's own minute of back-off would hide a cloud that
    # has come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    # The cloud announces what it accepts in the handshake; replies are small.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.enable_http_proxy", 0),
    ("grpc.primary_user_agent", "offramp-edge"),
)


class GrpcTransport:
    """A `Transport` over one channel. Made and used in one event loop.

    on_lost   called when a connection that stood is gone, with or without work in flight
    """

    def __init__(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None = None,
        *,
        keepalive_s: float = _KEEPALIVE_S,
    ) -> None:
        """`target` is HOST:PORT; without credentials everything travels in the clear. A link that
        swallows everything is found out, with or without work in flight, by a ping that is not
        answered; it is sent after `keepalive_s` of silence."""
        options = [*_OPTIONS, ("grpc.keepalive_time_ms", int(1000 * keepalive_s))]
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options=options)
        self._stub: Any = pb_grpc.OffloadServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._stream: _Stream | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self._watching = asyncio.create_task(self._watch())

    async def hello(self, hello: Hello, *, timeout_s: float) -> Welcome:
        try:
            reply = await self._stub.Hello(hello_to_pb(hello), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from None
        return welcome_from_pb(reply)

    async def complete(self, work: Offload, *, timeout_s: float) -> Completion:
        if self._stream is None or self._stream.ended:
            self._stream = _Stream(self._stub.CompleteStream())
        try:
            async with asyncio.timeout(timeout_s):
                outcome = await self._stream.ask(offload_to_pb(work))
        except TimeoutError:
            raise DeadlineExceeded(f"no answer in {1000 * timeout_s:.0f} ms") from None
        if outcome.WhichOneof("outcome") == "error":
            raise _error(_BY_NUMBER.get(outcome.error.code), outcome.error.message)
        return completion_from_pb(outcome.reply)

    async def close(self) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        if self._stream is not None:
            await self._stream.close()
        await self._channel.close(None)

    async def _watch(self) -> None:
        state = self._channel.get_state()
        while True:
            await self._channel.wait_for_state_change(state)
            before, state = state, self._channel.get_state()
            if before is grpc.ChannelConnectivity.READY:
                self.on_lost()


class _Stream:
    """One CompleteStream call: requests out, replies back in any order."""

    def __init__(self, call: Any) -> None:
        self.ended = False
        self._call = call
        self._asked: dict[str, asyncio.Future[pb.StreamReply]] = {}
        # A write that is cancelled cancels the whole call in grpc.aio: only this task writes.
        self._out: asyncio.Queue[pb.OffloadRequest] = asyncio.Queue()
        self._tasks = [asyncio.create_task(job) for job in (self._write(), self._read())]

    async def ask(self, request: pb.OffloadRequest) -> pb.StreamReply:
        """Raises what ended the stream when it ends before the reply."""
        reply: asyncio.Future[pb.StreamReply] = asyncio.get_running_loop().create_future()
        if self.ended:
            raise CloudUnavailable("the cloud closed the stream")
        self._asked[request.request_id] = reply
        self._out.put_nowait(request)
        try:
            return await reply
        finally:
            del self._asked[request.request_id]

    async def close(self) -> None:
        self.ended = True
        for task in self._tasks:
            task.cancel()
        self._call.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self) -> None:
        while True:
            request = await self._out.get()
            if request.request_id not in self._asked:
                continue  # nobody waits for it any more
            try:
                await self._call.write(request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reader hears of it too, and tells

    async def _read(self) -> None:
        failure: Exception = CloudUnavailable("the cloud closed the stream")
        try:
            while (reply := await self._call.read()) is not _EOF:
                self._arrived(reply)
            # A stream that ends in an error status ends like any other: the status tells.
            if (code := await self._call.code()) is not grpc.StatusCode.OK:
                failure = _error(code, await self._call.details() or "the stream ended")
        except grpc.aio.AioRpcError as error:
            failure = _translated(error)
        except asyncio.CancelledError:
            failure = CloudUnavailable("this device closed its connection")
            raise
        finally:
            self.ended = True
            self._tasks[0].cancel()  # the writer
            for waiting in self._asked.values():
                if not waiting.done():
                    waiting.set_exception(failure)

    def _arrived(self, reply: pb.StreamReply) -> None:
        outcome = reply.WhichOneof("outcome")
        if outcome is None:
            return  # from a newer cloud: whoever waits for it learns by the time-out
        waiting = self._asked.get(getattr(reply, outcome).request_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)


def _translated(error: grpc.aio.AioRpcError) -> OfframpError:
    return _error(error.code(), error.details() or "no details")


def _error(code: grpc.StatusCode | None, message: str) -> OfframpError:
    name = "an unknown status" if code is None else code.name
    if "SSL_ERROR_SSL" in message:  # no status of its own: gRPC says UNAVAILABLE
        return ConfigError(f"{message}; check --ca, and that the cloud serves TLS for this address")
    if "Socket closed" in message:
        message += (
            " (a cloud with TLS ends so who comes without, or without a certificate it wants)"
        )
    kind = CloudUnavailable if code is None else _ERRORS.get(code, CloudUnavailable)
    return kind(f"{name}: {message}")
