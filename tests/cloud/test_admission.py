"""Whom the gateway lets in, over real gRPC and TLS: names, revocation, quotas, limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cloud_world import WatchedLayers, World
from grpc_health.v1 import health_pb2, health_pb2_grpc

from offramp_cloud.admission import Admission
from offramp_cloud.backends import LocalBackend
from offramp_cloud.gateway import Gateway, GatewaySettings
from offramp_cloud.host import Host
from offramp_cloud.quotas import Quota
from offramp_cloud.served import Served
from offramp_common import certs
from offramp_common.messages import offload_to_pb
from offramp_common.revocation import Revocations, revoke
from offramp_common.wire import offload_pb2_grpc as pb_grpc

Status = grpc.StatusCode


class Gate:
    """A gateway with an engine in this process; devices call it by their certificates' names."""

    def __init__(self, folder: Path, world: World, **settings: Any) -> None:
        self.folder, self.served = folder, list[Served]()
        self.layers = WatchedLayers(world.layers)
        self.backend = LocalBackend(Host([world.engine(self.layers)]))
        self.gateway = Gateway(
            GatewaySettings(listen="127.0.0.1:0", drain_s=5.0, **settings),
            certs.server_credentials(folder, require_client=True),
            [self.served.append],
            Revocations(folder / "revoked.txt", folder / "ca.pem"),
        )
        self.address = self.gateway.bind()

    @contextlib.asynccontextmanager
    async def device(self, name: str) -> AsyncIterator[Any]:
        credentials = certs.channel_credentials(
            certs.pair_of(self.folder, "ca").cert, *certs.pair_of(self.folder, name)
        )
        # A connection of its own, as another process would have.
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.secure_channel(self.address, credentials, options) as channel:
            yield channel


@contextlib.asynccontextmanager
async def gate(folder: Path, world: World, **settings: Any) -> AsyncIterator[Gate]:
    gate = Gate(folder, world, **settings)
    await gate.gateway.start(gate.backend)
    try:
        yield gate
    finally:
        gate.layers.free.set()
        await gate.gateway.drain()
        await gate.backend.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certs.init(tmp_path)
    for name in ("cam-1", "cam-2"):
        certs.issue(tmp_path, name)
    return tmp_path


async def refused(channel: Any, message: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pb_grpc.OffloadServiceStub(channel).Complete(message, timeout=20)
    return caught.value


async def asked(stream: Any, message: Any) -> Any:
    """The stream's reply to it."""
    await stream.write(message)
    return await stream.read()


async def test_a_revoked_device_is_refused_on_a_connection_that_stands(
    world: World, folder: Path
) -> None:
    message = offload_to_pb(world.offload())
    async with (
        gate(folder, world) as door,
        door.device("cam-1") as one,
        door.device("cam-2") as two,
    ):
        stub = pb_grpc.OffloadServiceStub(one)
        stream = stub.CompleteStream()
        await stream.write(message)
        assert (await stream.read()).WhichOneof("outcome") == "reply"
        revoke(folder, "cam-1")
        answered = 0
        async with asyncio.timeout(20):  # the list's date is looked at once a second
            while (await asked(stream, message)).WhichOneof("outcome") == "reply":
                answered += 1
        assert (await asked(stream, message)).error.code == Status.PERMISSION_DENIED.value[0]
        error = await refused(one, message)
        assert error.code() == Status.PERMISSION_DENIED
        assert "the certificate of 'cam-1'" in (error.details() or "")
        await pb_grpc.OffloadServiceStub(two).Complete(message, timeout=20)
        # Before, until it was noticed, the answer that said so, and two more.
        assert [served.device for served in door.served] == ["cam-1"] * (answered + 4) + ["cam-2"]
        stream.cancel()


async def test_a_device_beyond_its_quota_is_told_when_to_come_again(
    world: World, folder: Path
) -> None:
    message = offload_to_pb(world.offload())
    admission = Admission(quota=Quota(requests_per_s=0.01, burst_s=200.0))
    async with (
        gate(folder, world, admission=admission) as door,
        door.device("cam-1") as one,
        door.device("cam-2") as two,
    ):
        stub = pb_grpc.OffloadServiceStub(one)
        for _ in range(2):
            await stub.Complete(message, timeout=20)
        error = await refused(one, message)
        assert error.code() == Status.RESOURCE_EXHAUSTED
        trailing: Any = error.trailing_metadata()
        pushback_ms = int(dict(trailing)["grpc-retry-pushback-ms"])
        assert 1_000 < pushback_ms <= 100_000
        stream = stub.CompleteStream()
        await stream.write(message)
        answer = (await stream.read()).error
        assert answer.code == Status.RESOURCE_EXHAUSTED.value[0]
        assert 1_000 < answer.retry_after_ms <= 100_000
        stream.cancel()
        await pb_grpc.OffloadServiceStub(two).Complete(message, timeout=20)


async def test_layers_are_charged_from_where_the_device_stopped(world: World, folder: Path) -> None:
    never = {"threshold": (0.0,) * 4}
    message = offload_to_pb(world.offload((5, 6), depth=1, knobs=never))
    admission = Admission(quota=Quota(layer_runs_per_s=1e-6, burst_s=7e6))  # seven at once
    async with gate(folder, world, admission=admission) as door, door.device("cam-1") as one:
        stub = pb_grpc.OffloadServiceStub(one)
        await stub.Complete(message, timeout=20)  # six of them: two samples, three layers
        await stub.Complete(message, timeout=20)  # one was left, which is enough to begin
        assert (await refused(one, message)).code() == Status.RESOURCE_EXHAUSTED


async def test_connections_beyond_the_limit_wait_outside(world: World, folder: Path) -> None:
    check = health_pb2.HealthCheckRequest()
    async with gate(folder, world, max_connections=1) as door:
        async with door.device("cam-1") as one:
            await health_pb2_grpc.HealthStub(one).Check(check, timeout=20)
            async with door.device("cam-2") as two:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await health_pb2_grpc.HealthStub(two).Check(check, timeout=20)
                assert caught.value.code() == Status.UNAVAILABLE
        async with door.device("cam-2") as two:
            await health_pb2_grpc.HealthStub(two).Check(check, timeout=20, wait_for_ready=True)


async def test_a_device_that_reads_nothing_is_read_no_further(world: World, folder: Path) -> None:
    """Replies must fill the connection's buffers before anything stops: hence so many samples."""
    message = offload_to_pb(world.offload([3] * 200, depth=3))
    reply_bytes = 200 * (5 * 4 + 4 + 1)
    admission = Admission(in_flight_per_stream=4)
    async with gate(folder, world, admission=admission) as door, door.device("cam-1") as channel:
        stream = pb_grpc.OffloadServiceStub(channel).CompleteStream()
        written = 0

        async def write() -> None:
            nonlocal written
            while True:
                await stream.write(message)
                written += 1

        writing = asyncio.create_task(write())
        still_s = 0.0
        async with asyncio.timeout(60):
            while still_s < 1.0:  # nothing has moved for so long
                before = written, len(door.served)
                await asyncio.sleep(0.1)
                still_s = still_s + 0.1 if before == (written, len(door.served)) else 0.0
        assert not door.gateway.at_work
        # What the gateway answered lies in the connection's buffers, but for the few it keeps.
        assert len(door.served) * reply_bytes < 4 * 2**20
        async with door.device("cam-2") as other:
            await pb_grpc.OffloadServiceStub(other).Complete(message, timeout=20)
        writing.cancel()
        stream.cancel()
