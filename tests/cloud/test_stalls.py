"""Devices that stop in the middle do not keep their place: over real gRPC on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from offramp_cloud.admission import Admission
from offramp_cloud.backends import Replica
from offramp_cloud.gateway import Gateway, GatewaySettings
from offramp_cloud.gauges import add_gauges
from offramp_cloud.identity import Caller
from offramp_cloud.stalls import IDLE, REPLY, REQUEST, Stalls, shut_connection
from offramp_cloud.statuses import Outcome
from offramp_common.wire import offload_pb2 as pb
from offramp_common.wire import offload_pb2_grpc as pb_grpc

Status = grpc.StatusCode
_COMPLETE = "/offramp.v1.OffloadService/Complete"
_BULKY, _SMALL, _HELD = (
    pb.OffloadRequest(request_id=name, bundle="toy") for name in ("bulky", "small", "held")
)
_DATA, _HEADERS, _RST_STREAM, _SETTINGS = 0, 1, 3, 4  # frames of HTTP/2
_END_HEADERS = 4
_ENOUGH = 400  # bulky replies: they do not fit into the buffers of any connection


class Replies:
    """A backend whose replies are as large as asked for."""

    bundles = ("toy",)

    def __init__(self) -> None:
        self.free = asyncio.Event()  # those called "held" wait for it

    def depth_of(self, bundle: str, digest: bytes) -> int:
        return 0

    async def complete(
        self, bundle: str, digest: bytes, request: bytes, budget_ms: float
    ) -> Outcome:
        asked = pb.OffloadRequest.FromString(request).request_id
        if asked == "held":
            await self.free.wait()
        answers = bytes(20_000 if asked == "bulky" else 4)
        reply = pb.OffloadReply(request_id=asked, answers=answers)
        return Outcome(reply.SerializeToString())

    async def hello(
        self, bundle: str, digests: Collection[bytes], request: bytes, budget_ms: float
    ) -> Outcome:
        return Outcome(pb.HelloReply().SerializeToString())

    async def probe(self, bundle: str, timeout_s: float) -> list[Replica]:
        return [Replica(1, "", {})]

    async def close(self) -> None: ...


@contextlib.asynccontextmanager
async def gateway(
    stall_timeout_s: float,
    max_rpcs: int,
    idle_timeout_s: float = 900.0,
    backend: Replies | None = None,
) -> AsyncIterator[tuple[Gateway, str]]:
    admission = Admission(
        in_flight_per_stream=4, stall_timeout_s=stall_timeout_s, idle_timeout_s=idle_timeout_s
    )
    one = Gateway(GatewaySettings("127.0.0.1:0", admission=admission, max_rpcs=max_rpcs))
    address = one.bind()
    await one.start(backend or Replies())
    try:
        yield one, address
    finally:
        await one.drain()


def device(address: str, *options: tuple[str, int]) -> grpc.aio.Channel:
    """A connection of its own, as another process would have."""
    return grpc.aio.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1), *options))


async def asked(stream: Any, message: pb.OffloadRequest) -> str:
    """What the stream replies to it."""
    await stream.write(message)
    return str((await stream.read()).WhichOneof("outcome"))


async def all_of(stream: Any) -> None:
    async with asyncio.timeout(20):
        while await stream.read() is not grpc.aio.EOF:
            pass


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Of HTTP/2."""
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


async def taken(stub: Any) -> None:
    """One call is let in, within a while: a place comes free a moment after the status of who had it."""
    async with asyncio.timeout(20):
        while True:
            try:
                await stub.Complete(_SMALL)
            except grpc.aio.AioRpcError as error:
                if error.code() is not Status.RESOURCE_EXHAUSTED:
                    raise
                await asyncio.sleep(0.01)
            else:
                return


async def its_end(reader: asyncio.StreamReader) -> None:
    """Until the other side is done with stream 1, and wants no more of it."""
    while True:
        head = await reader.readexactly(9)
        await reader.readexactly(int.from_bytes(head[:3], "big"))
        if (head[3], int.from_bytes(head[5:], "big")) == (_RST_STREAM, 1):
            return


async def code_of(call: Any) -> Any:
    async with asyncio.timeout(20):
        return await call.code()


async def test_a_stream_whose_replies_are_not_taken_gives_its_place_back_and_disturbs_nobody() -> (
    None
):
    """Of two places the slow reader has one, a good device the other; a third device waits for one."""
    async with gateway(1.0, max_rpcs=2) as (one, address), device(address) as slow:
        async with device(address) as good, device(address) as third:
            reads = pb_grpc.OffloadServiceStub(good).CompleteStream()
            assert await asked(reads, _SMALL) == "reply"
            stuck = pb_grpc.OffloadServiceStub(slow).CompleteStream()
            for _ in range(_ENOUGH):
                await stuck.write(_BULKY)
            stub, told = pb_grpc.OffloadServiceStub(third), set()
            async with asyncio.timeout(30):
                while not one.stalled[REPLY]:
                    assert await asked(reads, _SMALL) == "reply"
                    told.add(await stub.Complete(_SMALL).code())
            assert Status.RESOURCE_EXHAUSTED in told
            await taken(stub)
            assert await asked(reads, _SMALL) == "reply"
            reads.cancel()
        # Of what lies in its buffers it may still read some; then it is told that its connection is gone.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await all_of(stuck)
        assert caught.value.code() == Status.UNAVAILABLE
        assert one.stalled == {REQUEST: 0, REPLY: 1, IDLE: 0}
        registry = CollectorRegistry()
        add_gauges(registry, one)
        counted = registry.get_sample_value("offramp_cloud_stalled_total", {"what": REPLY})
        assert counted == 1


async def test_a_call_whose_request_does_not_come_is_told_so_and_ends() -> None:
    async with (
        gateway(0.5, max_rpcs=1) as (one, address),
        device(address) as slow,
        device(address) as good,
    ):
        silent = slow.stream_unary(_COMPLETE)()
        await silent.wait_for_connection()
        assert await code_of(silent) == Status.DEADLINE_EXCEEDED
        assert "has not come in 0.5 s" in await silent.details()
        await taken(pb_grpc.OffloadServiceStub(good))
        assert one.stalled == {REQUEST: 1, REPLY: 0, IDLE: 0}


async def test_a_call_without_a_request_is_an_invalid_argument() -> None:
    async with gateway(20.0, max_rpcs=1) as (_, address), device(address) as channel:
        call = channel.stream_unary(_COMPLETE)()
        await call.done_writing()
        assert await code_of(call) == Status.INVALID_ARGUMENT


async def test_a_call_whose_one_reply_is_not_taken_ends() -> None:
    narrow = (("grpc.http2.lookahead_bytes", 5), ("grpc.http2.bdp_probe", 0))
    async with gateway(0.5, max_rpcs=2) as (one, address), device(address, *narrow) as channel:
        # As a stream: gRPC's client would read a unary call's reply by itself.
        channel.unary_stream(_COMPLETE)(_BULKY.SerializeToString())
        async with asyncio.timeout(20):
            while not one.stalled[REPLY]:  # noqa: ASYNC110 - what it waits for has no event
                await asyncio.sleep(0.01)


async def test_a_stream_that_asks_for_nothing_ends_well_and_gives_its_place_back() -> None:
    async with (
        gateway(20.0, max_rpcs=1, idle_timeout_s=0.5) as (one, address),
        device(address) as channel,
        device(address) as other,
    ):
        stub = pb_grpc.OffloadServiceStub(channel)
        stream = stub.CompleteStream()
        for _ in range(3):
            assert await asked(stream, _SMALL) == "reply"
        assert await code_of(stream) == Status.OK
        assert one.stalled == {REQUEST: 0, REPLY: 0, IDLE: 1}
        await taken(pb_grpc.OffloadServiceStub(other))


async def test_a_device_may_open_another_stream_on_its_connection_after_an_idle_one() -> None:
    async with (
        gateway(20.0, max_rpcs=8, idle_timeout_s=0.5) as (_, address),
        device(address) as channel,
    ):
        stub = pb_grpc.OffloadServiceStub(channel)
        assert await code_of(stub.CompleteStream()) == Status.OK
        again = stub.CompleteStream()
        assert await asked(again, _SMALL) == "reply"
        assert await code_of(again) == Status.OK
        silent = stub.CompleteStream()  # from the first moment on
        await silent.wait_for_connection()
        assert await code_of(silent) == Status.OK


async def test_a_stream_with_a_request_at_work_is_not_idle() -> None:
    backend = Replies()
    async with (
        gateway(20.0, max_rpcs=2, idle_timeout_s=0.5, backend=backend) as (one, address),
        device(address) as channel,
    ):
        stub = pb_grpc.OffloadServiceStub(channel)
        works = stub.CompleteStream()
        await works.write(_HELD)
        async with asyncio.timeout(20):
            while not one.at_work:  # noqa: ASYNC110 - what it waits for has no event
                await asyncio.sleep(0.01)
        for _ in range(2):  # others become idle meanwhile
            assert await code_of(stub.CompleteStream()) == Status.OK
        backend.free.set()
        assert (await works.read()).WhichOneof("outcome") == "reply"
        # And now it is.
        assert await code_of(works) == Status.OK
        assert one.stalled[IDLE] == 3


async def test_a_message_that_has_half_arrived_goes_with_its_idle_stream() -> None:
    """By hand: no gRPC client sends half a message."""
    path = _COMPLETE.replace("Complete", "CompleteStream").encode()
    headers = b"\x83\x86" + b"".join(  # :method POST, :scheme http
        b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
        for name, value in (
            (b":path", path),
            (b":authority", b"x"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
    )
    half = b"\0" + (30_000).to_bytes(4, "big") + bytes(15_000)
    async with gateway(20.0, max_rpcs=1, idle_timeout_s=0.5) as (one, address):
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(_SETTINGS, 0, 0))
        writer.write(frame(_HEADERS, _END_HEADERS, 1, headers) + frame(_DATA, 0, 1, half))
        async with asyncio.timeout(20):
            await its_end(reader)
        assert one.stalled[IDLE] == 1
        writer.close()


async def test_who_reads_again_in_time_is_told_why_and_keeps_its_connection() -> None:
    class Call:
        """One whose status gets through at once."""

        told = ""

        async def abort(self, code: Any, details: str) -> None:
            self.told = f"{code.name} {details}"
            raise grpc.aio.AbortError("Locally aborted.")

    call, stalls = Call(), Stalls(3.0)
    with pytest.raises(grpc.aio.AbortError):
        await stalls.end(call, Caller(peer="ipv4:127.0.0.1:1"))
    assert call.told.startswith("UNAVAILABLE no reply was taken for 3 s")
    assert stalls.ended[REPLY] == 1


def test_a_connection_that_is_not_there_is_not_shut() -> None:
    assert not shut_connection("ipv4:127.0.0.1:1")
    assert not shut_connection("unix:")
