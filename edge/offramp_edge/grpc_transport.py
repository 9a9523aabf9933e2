"""Work over gRPC: with grpc_stream.py and grpc_errors.py the one place that knows its calls and options.

All work of one device goes over one long-lived stream, matched by request id: beside a call for each
that saves a third of the bytes around a message and about a tenth of the device's CPU
(benchmarks/unary_or_stream.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc

from offramp_common.errors import CloudUnavailable, DeadlineExceeded
from offramp_common.messages import completion_from_pb, hello_to_pb, offload_to_pb, welcome_from_pb
from offramp_common.transport import Completion, Hello, Offload, Welcome
from offramp_common.wire import offload_pb2 as pb
from offramp_common.wire import offload_pb2_grpc as pb_grpc
from offramp_edge.grpc_errors import numbered, translated
from offramp_edge.grpc_stream import EndedWell, WorkStream

_SERVICE = pb.DESCRIPTOR.services_by_name["OffloadService"].full_name
_COMPLETE_STREAM = f"/{_SERVICE}/CompleteStream"
_KEEPALIVE_S = 20.0
_KEEPALIVE_TIMEOUT_S = 10.0  # pings queue behind frames on a slow link
_LAST_EVENT_S = 1.0
_OPTIONS = (
    ("grpc.keepalive_timeout_ms", int(1000 * _KEEPALIVE_TIMEOUT_S)),
    # Of the pings that measure the connection: while one is out, no other is sent.
    ("grpc.http2.ping_timeout_ms", int(1000 * _KEEPALIVE_TIMEOUT_S)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The breaker decides when to try again; gRPC's own minute of back-off would hide a cloud that
    # has come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In which a connection must come about: TCP and TLS over a satellite take more than a second. Who greets
    # waits as long as it likes, and the next greeting has a connection of its own.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 300),
    ("grpc.use_local_subchannel_pool", 1),
    # The cloud announces what it accepts in the handshake; replies are small.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.enable_http_proxy", 0),
    ("grpc.primary_user_agent", "offramp-edge"),
)


class _Connection:
    """One channel with its stream of work; `on_lost` is told when it stood and is gone."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        on_lost: Callable[[_Connection], None],
        on_late: Callable[[], None],
    ) -> None:
        self.stub: Any = pb_grpc.OffloadServiceStub(channel)  # type: ignore[no-untyped-call]
        self._channel, self._on_lost, self._on_late = channel, on_lost, on_late
        # Bytes both ways: requests are serialized, and counted, once; a reply that is none is noticed.
        self._complete_stream: Any = channel.stream_stream(
            _COMPLETE_STREAM, request_serializer=None, response_deserializer=None
        )
        self._stream: WorkStream | None = None
        self._closed = False
        self._watching = asyncio.create_task(self._watch())

    def stream(self) -> WorkStream:
        if self._stream is None or self._stream.ended:
            self._stream = WorkStream(self._complete_stream(), self._on_late)
        return self._stream

    async def close(self) -> None:
        self._closed = True
        if self._stream is not None:
            await self._stream.close()
        await self._channel.close(None)
        # It ends with the channel. Cancelled before, it would leave an event on its way to this event loop,
        # which may be closed when it comes.
        await asyncio.wait({self._watching}, timeout=_LAST_EVENT_S)
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    async def _watch(self) -> None:
        state = self._channel.get_state()
        while not self._closed:
            await self._channel.wait_for_state_change(state)
            before, state = state, self._channel.get_state()
            if before is grpc.ChannelConnectivity.READY and not self._closed:
                self._on_lost(self)


class GrpcTransport:
    """A `Transport` over one connection at a time. Made and used in one event loop.

    on_lost   called when a connection that stood is gone, with or without work in flight
    late      replies that came when nobody waited for them any more, and were dropped
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
        self._target, self._credentials = target, credentials
        self._options = [*_OPTIONS, ("grpc.keepalive_time_ms", int(1000 * keepalive_s))]
        self.late = 0
        self.on_lost: Callable[[], None] = lambda: None
        self._unanswered = 0  # greetings under way
        self._suspect = False  # the connection may be dead without a word
        self._current = self._connected()

    async def hello(self, hello: Hello, *, timeout_s: float) -> Welcome:
        """While one is not answered the next comes over a new connection, and the first that is answered
        decides which is used from then on: a link that has swallowed packets, or changed them, is well
        again long before TCP and HTTP/2 are."""
        fresh = self._suspect or self._unanswered > 0
        connection = self._connected() if fresh else self._current
        self._unanswered += 1
        try:
            reply = await connection.stub.Hello(hello_to_pb(hello), timeout=timeout_s)
            if reply is None:  # gRPC's word for one that could not be parsed
                raise CloudUnavailable("the cloud's greeting is no message: bytes were changed")
            if fresh:
                connection, self._current = self._current, connection
            self._suspect = False
        except grpc.aio.AioRpcError as error:
            self._suspect |= error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            raise translated(error) from None
        finally:
            self._unanswered -= 1
            if fresh:
                await connection.close()  # the one that is not used
        return welcome_from_pb(reply)

    async def complete(self, work: Offload, *, timeout_s: float) -> Completion:
        request = offload_to_pb(work).SerializeToString()
        try:
            async with asyncio.timeout(timeout_s):
                outcome = await self._asked(work.request_id, request)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer in {1000 * timeout_s:.0f} ms") from None
        if outcome.WhichOneof("outcome") == "error":
            failed = outcome.error
            raise numbered(failed.code, failed.message, failed.retry_after_ms)
        done = completion_from_pb(outcome.reply)
        return replace(done, bytes_up=len(request), bytes_down=outcome.reply.ByteSize())

    async def close(self) -> None:
        await self._current.close()

    async def _asked(self, request_id: str, request: bytes) -> pb.StreamReply:
        try:
            return await self._current.stream().ask(request_id, request)
        except EndedWell:  # it was idle until this request, which the cloud has not seen
            return await self._current.stream().ask(request_id, request)

    def _connected(self) -> _Connection:
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(self._target, options=self._options)
        else:
            channel = grpc.aio.secure_channel(
                self._target, self._credentials, options=self._options
            )
        return _Connection(channel, self._lost, self._was_late)

    def _lost(self, connection: _Connection) -> None:
        if connection is self._current:
            self.on_lost()

    def _was_late(self) -> None:
        self.late += 1
