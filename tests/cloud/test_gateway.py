"""The gateway over real gRPC and TLS on loopback, with an engine in the same process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cloud_world import WatchedLayers, World, assert_same
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from offramp_cloud.admission import Admission
from offramp_cloud.backends import LocalBackend, Replica
from offramp_cloud.gateway import Gateway, GatewaySettings
from offramp_cloud.host import Host
from offramp_cloud.metrics import Metrics
from offramp_cloud.served import JsonFormatter, LineFormatter, Served
from offramp_cloud.statuses import Outcome
from offramp_cloud.waiting import Load
from offramp_common.certs import channel_credentials, server_credentials
from offramp_common.errors import CloudUnavailable, ConfigError
from offramp_common.frames import Limits
from offramp_common.messages import (
    completion_from_pb,
    hello_to_pb,
    offload_to_pb,
    welcome_from_pb,
)
from offramp_common.transport import Completion, Hello, Offload
from offramp_common.wire import offload_pb2 as pb
from offramp_common.wire import offload_pb2_grpc as pb_grpc

LIMITS = Limits(max_frame_bytes=64 * 2**10, max_rows=64)
Status = grpc.StatusCode


@dataclass
class Door:
    """A running gateway, a device's channel to it, and what it reported."""

    gateway: Gateway
    address: str
    channel: grpc.aio.Channel
    served: list[Served]

    @property
    def stub(self) -> Any:
        return pb_grpc.OffloadServiceStub(self.channel)

    async def complete(self, work: Offload, **call: Any) -> Completion:
        return completion_from_pb(await self.stub.Complete(offload_to_pb(work), **call))

    async def refused(self, message: Any, method: str = "Complete", **call: Any) -> tuple[Any, str]:
        """The status and message that a call ends with."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(self.stub, method)(message, **call)
        return caught.value.code(), caught.value.details() or ""


@contextlib.asynccontextmanager
async def opened(
    backend: Any, tls_dir: Path, *, device: str | None = None, **settings: Any
) -> AsyncIterator[Door]:
    served: list[Served] = []
    require = device is not None
    settings = {"limits": LIMITS, "drain_s": 5.0, "listen": "localhost:0", **settings}
    credentials = server_credentials(tls_dir, require_client=require)
    gateway = Gateway(GatewaySettings(**settings), credentials, [served.append])
    address = gateway.bind()
    pair = (tls_dir / f"{device}.pem", tls_dir / f"{device}.key") if device else (None, None)
    channel = grpc.aio.secure_channel(address, channel_credentials(tls_dir / "ca.pem", *pair))
    try:
        await gateway.start(backend)
        yield Door(gateway, address, channel, served)
    finally:
        await channel.close()
        await gateway.drain()
        await backend.close()


@pytest.fixture
def watched(world: World) -> WatchedLayers:
    return WatchedLayers(world.layers)


@pytest.fixture
def backend(world: World, watched: WatchedLayers) -> LocalBackend:
    return LocalBackend(Host([world.engine(watched, limits=LIMITS)]))


@pytest.fixture
async def door(backend: LocalBackend, tls_dir: Path) -> AsyncIterator[Door]:
    async with opened(backend, tls_dir) as door:
        yield door


async def replies_of(stream: Any, count: int) -> dict[str, pb.StreamReply]:
    """The next `count` replies on a stream, by request id."""
    found = {}
    for _ in range(count):
        reply = await stream.read()
        assert reply is not grpc.aio.EOF, "the stream ended early"
        found[reply.reply.request_id or reply.error.request_id] = reply
    return found


async def test_a_device_says_hello_and_gets_the_answers_it_would_have_given(
    world: World, door: Door
) -> None:
    hello = Hello("toy", {1: world.bundle.digest(1)}, ("int8",))
    welcome = welcome_from_pb(await door.stub.Hello(hello_to_pb(hello)))
    assert welcome.limits == replace(LIMITS, max_tokens=64)
    for depth in range(4):
        acts = world.rows((5, 9, 3), depth)
        assert_same(await door.complete(world.offload_of(acts)), world.local(acts))


async def test_sixty_four_requests_at_once_are_all_answered(world: World, door: Door) -> None:
    acts = [world.rows((4 + i % 9,), i % 4, seed=i) for i in range(64)]
    got = await asyncio.gather(
        *(door.complete(world.offload_of(a, request_id=f"r{i}")) for i, a in enumerate(acts))
    )
    for i, (one, completion) in enumerate(zip(acts, got, strict=True)):
        assert_same(completion, world.local(one, request_id=f"r{i}"), exactly=False)
    assert {served.status for served in door.served} == {"OK"}


async def test_each_fault_has_its_status_and_says_what_to_do(world: World, door: Door) -> None:
    good = world.offload()
    frame = good.frame
    cases: list[tuple[Offload, Any, str]] = [
        (replace(good, bundle="other"), Status.NOT_FOUND, "served: toy"),
        (replace(good, digest=b"\1" * 16), Status.FAILED_PRECONDITION, "offramp bundle digest"),
        (replace(good, frame=frame[:-9]), Status.INVALID_ARGUMENT, "cut short"),
        (replace(good, frame=b""), Status.INVALID_ARGUMENT, "not a frame"),
        (replace(good, frame=frame + b"\0"), Status.INVALID_ARGUMENT, "after its end"),
        (replace(good, request_id=""), Status.INVALID_ARGUMENT, "request_id"),
        (replace(good, request_id="x" * 65), Status.INVALID_ARGUMENT, "request_id"),
        (replace(good, deadline_ms=-1.0), Status.DEADLINE_EXCEEDED, "0 ms passed"),
        (
            replace(good, knobs={"threshold": (0.5,)}),
            Status.INVALID_ARGUMENT,
            "1 values for 4 layers",
        ),
        (
            replace(good, frame=b"\x96\x01\x09" + frame[3:]),
            Status.INVALID_ARGUMENT,
            "accepts frames at depths [1]",
        ),
        (world.offload([3] * 65), Status.INVALID_ARGUMENT, "must be 1 to 64"),
        (replace(good, frame=b"\0" * (64 * 2**10 + 1)), Status.INVALID_ARGUMENT, "at most 65536"),
        (replace(good, frame=b"\0" * (129 * 2**10)), Status.RESOURCE_EXHAUSTED, "larger than max"),
    ]
    for work, status, message in cases:
        code, details = await door.refused(offload_to_pb(work))
        assert (code, message in details) == (status, True), (code, details, message)
    assert_same(await door.complete(good), world.local(world.rows((5,), 1)))


async def test_bytes_that_are_no_message_are_an_invalid_argument(door: Door) -> None:
    for method in ("Hello", "Complete"):
        call = door.channel.unary_unary(f"/offramp.v1.OffloadService/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\xff\xff\xff")
        assert caught.value.code() == Status.INVALID_ARGUMENT
        assert "3 bytes that are no " in (caught.value.details() or "")


async def test_a_hello_that_does_not_fit_is_refused_with_what_to_do(
    world: World, door: Door
) -> None:
    fits = Hello("toy", {1: world.bundle.digest(1)}, ("int8",))
    for hello, status, message in (
        (replace(fits, protocol=9), Status.FAILED_PRECONDITION, "update offramp on the cloud"),
        (replace(fits, digests={1: b"\1" * 16}), Status.FAILED_PRECONDITION, "from depth 1 on"),
        (replace(fits, bundle="other"), Status.NOT_FOUND, "served: toy"),
        (replace(fits, codecs=("zip",)), Status.INVALID_ARGUMENT, "this cloud decodes"),
    ):
        code, details = await door.refused(hello_to_pb(hello), "Hello")
        assert (code, message in details) == (status, True), details


async def test_a_stream_answers_good_requests_between_bad_ones(world: World, door: Door) -> None:
    stream = door.stub.CompleteStream()
    acts = {f"r{i}": world.rows((4 + i % 5,), i % 4, seed=i) for i in range(24)}
    bad: dict[str, tuple[Any, dict[str, Any]]] = {
        "r3": (Status.INVALID_ARGUMENT, {"frame": b"\x96garbage"}),
        "r8": (Status.FAILED_PRECONDITION, {"digest": b"\1" * 16}),
        "r13": (Status.NOT_FOUND, {"bundle": "other"}),
        "r21": (Status.INVALID_ARGUMENT, {"knobs": {"nonsense": (1.0,)}}),
    }
    for name, one in acts.items():
        work = world.offload_of(one, request_id=name)
        await stream.write(offload_to_pb(replace(work, **bad[name][1]) if name in bad else work))
    await stream.done_writing()
    got = await replies_of(stream, len(acts))
    assert await stream.read() is grpc.aio.EOF
    for name, one in acts.items():
        if name in bad:
            assert got[name].error.code == bad[name][0].value[0]
            assert got[name].error.message
        else:
            completion = completion_from_pb(got[name].reply)
            assert_same(completion, world.local(one, request_id=name), exactly=False)


async def test_garbage_on_a_stream_harms_no_request_behind_it(world: World, door: Door) -> None:
    stream = door.channel.stream_stream(
        "/offramp.v1.OffloadService/CompleteStream",
        response_deserializer=pb.StreamReply.FromString,
    )()
    await stream.write(b"\xff\xff\xff")
    await stream.write(offload_to_pb(world.offload()).SerializeToString())
    await stream.done_writing()
    got = await replies_of(stream, 2)
    assert got[""].error.code == Status.INVALID_ARGUMENT.value[0]
    assert_same(completion_from_pb(got["r"].reply), world.local(world.rows((5,), 1)))


async def test_replies_on_a_stream_come_as_they_are_ready(
    world: World, door: Door, watched: WatchedLayers
) -> None:
    stream = door.stub.CompleteStream()
    with watched.held():
        await stream.write(offload_to_pb(world.offload(request_id="first")))
        await asyncio.to_thread(watched.entered.wait)
        await stream.write(offload_to_pb(world.offload(request_id="second", digest=b"\1" * 16)))
        await stream.done_writing()
        assert list(await replies_of(stream, 1)) == ["second"]
    assert list(await replies_of(stream, 1)) == ["first"]


async def test_a_stream_has_only_so_many_requests_at_work(
    world: World, backend: LocalBackend, watched: WatchedLayers, tls_dir: Path
) -> None:
    admission = Admission(in_flight_per_stream=3)
    async with opened(backend, tls_dir, admission=admission) as door:
        stream = door.stub.CompleteStream()
        with watched.held():
            for i in range(8):
                await stream.write(offload_to_pb(world.offload(request_id=f"r{i}")))
            await asyncio.to_thread(watched.entered.wait)
            # Another caller's request gets past: the stream alone is held back.
            one = asyncio.create_task(door.complete(world.offload(depth=3, request_id="other")))
            await _until(lambda: door.gateway.at_work == 4)
        await stream.done_writing()
        assert len(await replies_of(stream, 8)) == 8
        await one


async def test_a_stream_that_breaks_cancels_its_work(
    world: World, door: Door, watched: WatchedLayers
) -> None:
    with watched.held():
        stream = door.stub.CompleteStream()
        for i in range(4):
            await stream.write(offload_to_pb(world.offload((5 + i, 5), request_id=f"r{i}")))
        await _until(lambda: door.gateway.at_work == 4)
        stream.cancel()
        await _until(lambda: door.gateway.at_work == 0)
    assert [served.status for served in door.served] == ["CANCELLED"] * 4
    await door.complete(world.offload())
    assert sum(depth == 1 for depth, _ in watched.runs) == 2  # the one at work, and the last


async def test_a_cancelled_call_is_dropped(
    world: World, door: Door, watched: WatchedLayers
) -> None:
    with watched.held():
        first = asyncio.create_task(door.complete(world.offload()))
        await asyncio.to_thread(watched.entered.wait)
        second = asyncio.create_task(door.complete(world.offload((6, 6))))
        await _until(lambda: door.gateway.at_work == 2)
        second.cancel()
        await _until(lambda: door.gateway.at_work == 1)
    await first
    await door.complete(world.offload())
    assert (1, 2) not in watched.runs


async def test_the_shorter_of_the_two_deadlines_counts(
    world: World, door: Door, watched: WatchedLayers
) -> None:
    with watched.held():
        status, details = await door.refused(
            offload_to_pb(world.offload(deadline_ms=30.0)), timeout=20
        )
        assert (status, "30 ms passed" in details) == (Status.DEADLINE_EXCEEDED, True), details
        status, _ = await door.refused(
            offload_to_pb(world.offload(deadline_ms=20_000.0)), timeout=0.03
        )
        assert status == Status.DEADLINE_EXCEEDED
        await _until(lambda: door.gateway.at_work == 0)


async def test_a_full_engine_is_resource_exhausted(
    world: World, watched: WatchedLayers, tls_dir: Path
) -> None:
    engine = world.engine(watched, load=Load(max_waiting_rows=2), limits=LIMITS)
    async with opened(LocalBackend(Host([engine])), tls_dir) as door:
        with watched.held():
            first = asyncio.create_task(door.complete(world.offload((5, 5))))
            await asyncio.to_thread(watched.entered.wait)
            status, details = await door.refused(offload_to_pb(world.offload()))
            assert (status, "retry later" in details) == (Status.RESOURCE_EXHAUSTED, True)
        await first


async def test_a_full_gateway_is_resource_exhausted(
    world: World, backend: LocalBackend, watched: WatchedLayers, tls_dir: Path
) -> None:
    admission = Admission(max_bytes_in_flight=1000)
    async with opened(backend, tls_dir, admission=admission) as door:
        with watched.held():
            first = asyncio.create_task(door.complete(world.offload()))
            await asyncio.to_thread(watched.entered.wait)
            status, details = await door.refused(offload_to_pb(world.offload()))
            assert (status, "at most 1000" in details) == (Status.RESOURCE_EXHAUSTED, True)
        await first


async def test_a_fault_in_the_engine_is_internal_and_tells_a_device_nothing_of_it(
    world: World, door: Door
) -> None:
    acts = world.rows((5,), 1)
    acts.hidden_BTD[0, 0, 0] = WatchedLayers.POISON
    status, details = await door.refused(offload_to_pb(world.offload_of(acts)))
    assert status == Status.INTERNAL
    assert details == "a fault in the cloud (RuntimeError); its log has the traceback"
    await door.complete(world.offload())


async def test_only_devices_with_a_certificate_are_let_in_and_are_known_by_name(
    world: World, backend: LocalBackend, tls_dir: Path
) -> None:
    async with opened(backend, tls_dir, device="kiosk-7") as door:
        await door.complete(world.offload())
        assert door.served[-1].device == "kiosk-7"
        for credentials in (channel_credentials(tls_dir / "ca.pem"), None):
            channel = (
                grpc.aio.insecure_channel(door.address)
                if credentials is None
                else grpc.aio.secure_channel(door.address, credentials)
            )
            async with channel:
                stub = pb_grpc.OffloadServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Complete(offload_to_pb(world.offload()), timeout=10)
                assert caught.value.code() == Status.UNAVAILABLE


class FlakyBackend(LocalBackend):
    """A local backend whose replicas can be gone."""

    gone = False

    async def complete(
        self, bundle: str, digest: bytes, request: bytes, budget_ms: float
    ) -> Outcome:
        if self.gone:
            raise CloudUnavailable("no replica could answer; retry later")
        return await super().complete(bundle, digest, request, budget_ms)

    async def probe(self, bundle: str, timeout_s: float) -> list[Replica]:
        return [] if self.gone else await super().probe(bundle, timeout_s)


async def test_health_follows_the_replicas_and_requests_are_refused_at_once(
    world: World, watched: WatchedLayers, tls_dir: Path
) -> None:
    backend = FlakyBackend(Host([world.engine(watched, limits=LIMITS)]))
    async with opened(backend, tls_dir, probe_every_s=0.05) as door:
        health = health_pb2_grpc.HealthStub(door.channel)

        async def serving(name: str) -> bool:
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

        watch = health.Watch(health_pb2.HealthCheckRequest(service="toy"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        names = ("", "offramp.v1.OffloadService", "toy")
        assert [await serving(name) for name in names] == [True] * 3
        backend.gone = True
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        status, details = await door.refused(offload_to_pb(world.offload()))
        assert (status, "no replica of 'toy' answers now" in details) == (Status.UNAVAILABLE, True)
        assert [await serving(name) for name in names] == [False] * 3
        backend.gone = False
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await door.complete(world.offload())
        watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await serving("nobody")
        assert caught.value.code() == Status.NOT_FOUND


async def test_a_request_that_finds_no_replica_has_the_health_looked_at_at_once(
    world: World, tls_dir: Path
) -> None:
    backend = FlakyBackend(Host([world.engine(limits=LIMITS)]))
    async with opened(backend, tls_dir, probe_every_s=60.0) as door:
        backend.gone = True
        assert (await door.refused(offload_to_pb(world.offload())))[0] == Status.UNAVAILABLE
        health = health_pb2_grpc.HealthStub(door.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        while (await watch.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass
        watch.cancel()


async def test_a_gateway_without_replicas_does_not_start(world: World, tls_dir: Path) -> None:
    backend = FlakyBackend(Host([world.engine()]))
    backend.gone = True
    with pytest.raises(CloudUnavailable, match="no replica of toy answers"):
        async with opened(backend, tls_dir):
            pass


async def test_reflection_lists_the_services(door: Door) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(door.channel)
    call = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    reply = await call.read()
    names = {service.name for service in reply.list_services_response.service}
    assert {"offramp.v1.OffloadService", "grpc.health.v1.Health"} <= names
    call.cancel()


async def test_draining_finishes_what_is_at_work_and_ends_open_streams(
    world: World, door: Door, watched: WatchedLayers
) -> None:
    idle = door.stub.CompleteStream()
    busy = door.stub.CompleteStream()
    await idle.write(offload_to_pb(world.offload(request_id="before")))
    await replies_of(idle, 1)
    with watched.held():
        await busy.write(offload_to_pb(world.offload(request_id="busy")))
        unary = asyncio.create_task(door.complete(world.offload()))
        await _until(lambda: door.gateway.at_work == 2)
        draining = asyncio.create_task(door.gateway.drain())
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
            await idle.read()
        assert await idle.code() == Status.UNAVAILABLE
        status, details = await door.refused(offload_to_pb(world.offload()))
        assert (status, "shutting down" in details) == (Status.UNAVAILABLE, True)
    assert list(await replies_of(busy, 1)) == ["busy"]
    await unary
    assert await draining
    assert await busy.code() == Status.UNAVAILABLE


async def test_a_drain_that_is_hurried_cuts_requests_off(
    world: World, door: Door, watched: WatchedLayers
) -> None:
    hurry = asyncio.Event()
    with watched.held():
        call = asyncio.create_task(door.refused(offload_to_pb(world.offload())))
        await _until(lambda: door.gateway.at_work == 1)
        draining = asyncio.create_task(door.gateway.drain(hurry))
        hurry.set()
        assert not await draining
        assert (await call)[0] in (Status.CANCELLED, Status.UNAVAILABLE)


async def test_a_port_in_use_is_a_config_error(door: Door, tls_dir: Path) -> None:
    gateway = Gateway(GatewaySettings(listen=door.address), server_credentials(tls_dir))
    with pytest.raises(ConfigError, match="the port is in use"):
        gateway.bind()
    await gateway.drain()


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the request log writes, as people and as machines read it, line by line."""
    kept: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.extend((LineFormatter().format(record), JsonFormatter().format(record)))

    logger = logging.getLogger("offramp_cloud.requests")
    handler, level = Keep(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield kept
    logger.removeHandler(handler)
    logger.setLevel(level)


async def test_each_request_is_one_line_that_no_stranger_can_break(
    world: World, door: Door, lines: list[str]
) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await door.complete(world.offload((5, 6), traceparent=traceparent))
    await door.complete(world.offload(), metadata=(("traceparent", traceparent),))
    await door.refused(offload_to_pb(world.offload(request_id='a" status="OK\nb', bundle="x\ny")))
    assert len(lines) == 6
    assert all("\n" not in line for line in lines)
    first, second, third = (json.loads(line) for line in lines[1::2])
    assert (first["event"], first["status"], first["rows"]) == ("request", "OK", 2)
    assert (first["id"], first["bundle"], first["traceparent"]) == ("r", "toy", traceparent)
    assert first["bytes"] > 1000
    assert first["ms"] >= first["compute_ms"] > 0
    assert second["traceparent"] == traceparent
    assert (third["id"], third["status"]) == ('a" status="OK\nb', "NOT_FOUND")
    assert 'status="OK" traceparent=' in lines[0]


async def test_metrics_count_requests_rows_exits_and_batches(world: World, door: Door) -> None:
    metrics = Metrics(lambda: door.gateway.replicas)
    door.gateway.observers.append(metrics.observe)
    address = metrics.listen("127.0.0.1:0")
    await door.complete(world.offload((5, 6), knobs={"threshold": (0.0,) * 4}))
    await door.refused(offload_to_pb(world.offload(bundle="other")))
    await door.gateway.probe()
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    await asyncio.to_thread(metrics.close)
    for line in (
        'offramp_cloud_requests_total{bundle="toy",status="OK"} 1.0',
        'offramp_cloud_requests_total{bundle="",status="NOT_FOUND"} 1.0',
        'offramp_cloud_rows_total{bundle="toy"} 2.0',
        'offramp_cloud_exits_total{bundle="toy",depth="4"} 2.0',
    ):
        assert line in text
    assert 'offramp_engine_layer_rows_total{bundle="toy",replica="' in text
    assert 'offramp_engine_batch_rows_bucket{bundle="toy",le="2",' in text


async def _until(condition: Any) -> None:
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.002)
