"""Requests reach replicas over ports of their own: real gRPC and TLS, engines in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cloud_world import WatchedLayers, World, assert_same
from toy_models import toy_bundle

from offramp_cloud import cluster_keys
from offramp_cloud.backends import ReplicatedBackend, depths_of
from offramp_cloud.host import Host
from offramp_cloud.rates import Rates, Work
from offramp_cloud.replica_link import Endpoint
from offramp_cloud.replica_server import SERVICE, ReplicaServer
from offramp_cloud.statuses import Outcome
from offramp_common.errors import CloudBusy, CloudUnavailable
from offramp_common.messages import completion_from_pb, hello_to_pb, offload_to_pb
from offramp_common.transport import Hello, Offload
from offramp_common.wire import offload_pb2 as pb

SECRET = bytes(range(32))
Status = grpc.StatusCode


@dataclass
class Replica:
    """A replica's server, its layers, and work that it says it has beside what is there."""

    endpoint: Endpoint
    server: ReplicaServer
    layers: WatchedLayers
    loads: list[int]

    async def die(self) -> None:
        """At once, with what it has at work."""
        assert self.server._server is not None
        await self.server._server.stop(0)


class Town:
    """Replicas as somebody placed them: a directory that the test writes."""

    def __init__(self) -> None:
        self.listed: dict[str, Endpoint] = {}
        self.replicas: list[Replica] = []
        self.down = False

    async def endpoints(self) -> dict[str, Endpoint]:
        if self.down:
            raise CloudUnavailable("no directory today")
        return dict(self.listed)

    async def add(self, world: World, order: float = 0.0, heartbeat_s: float = 0.5) -> Replica:
        layers, loads = WatchedLayers(world.layers), [0]
        engine = world.engine(layers)
        rates = Rates(engine)

        def work() -> Work:
            now = rates.now()
            return replace(now, left=now.left + loads[0])

        credentials = cluster_keys.server_credentials(SECRET)
        server = ReplicaServer(Host([engine]), credentials, work, heartbeat_s)
        depths = {digest.hex(): depth for digest, depth in depths_of(world.bundle).items()}
        name = f"replica-{len(self.replicas)}"
        address = await server.start("127.0.0.1")
        endpoint = Endpoint(name, address, "app", world.bundle.manifest.name, order, depths)
        self.listed[name] = endpoint
        self.replicas.append(Replica(endpoint, server, layers, loads))
        return self.replicas[-1]


async def nothing() -> None:
    """Nothing to close."""


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    town = Town()
    yield town
    for replica in town.replicas:
        replica.layers.free.set()
        await replica.server.close()


@contextlib.asynccontextmanager
async def backend_of(town: Town) -> AsyncIterator[ReplicatedBackend]:
    credentials = cluster_keys.channel_credentials(SECRET)
    backend = ReplicatedBackend(town, credentials, nothing, look_s=0.02)
    await backend.start(10.0)
    try:
        yield backend
    finally:
        await backend.close()


async def ask(backend: ReplicatedBackend, work: Offload, budget_ms: float = 20_000.0) -> Outcome:
    request = offload_to_pb(work).SerializeToString()
    return await backend.complete(work.bundle, work.digest, request, budget_ms)


async def answered(backend: ReplicatedBackend, world: World, depth: int = 1) -> None:
    acts = world.rows((5, 9, 3), depth)
    outcome = await ask(backend, world.offload_of(acts))
    assert not outcome.code, outcome.message
    assert_same(completion_from_pb(pb.OffloadReply.FromString(outcome.payload)), world.local(acts))


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.002)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Another version of `world`'s bundle: the same name, other weights."""
    path = tmp_path_factory.mktemp("newer") / "toy"
    return World(toy_bundle(path, "deebert", n_layers=4, seed=1))


async def test_a_replica_answers_as_the_device_would(world: World, town: Town) -> None:
    await town.add(world)
    async with backend_of(town) as backend:
        for depth in range(4):
            await answered(backend, world, depth)
        assert backend.depth_of("toy", world.bundle.digest(2)) == 2
        (replica,) = await backend.probe("toy", 5.0)
        assert replica.counters["requests"] == 4


async def test_many_requests_at_once_are_all_answered(world: World, town: Town) -> None:
    await town.add(world)
    await town.add(world)
    acts = [world.rows((4 + i % 9,), i % 4, seed=i) for i in range(64)]
    async with backend_of(town) as backend:
        got = await asyncio.gather(*(ask(backend, world.offload_of(each)) for each in acts))
    for each, outcome in zip(acts, got, strict=True):
        completion = completion_from_pb(pb.OffloadReply.FromString(outcome.payload))
        assert_same(completion, world.local(each), exactly=False)
    assert all(replica.layers.runs for replica in town.replicas)


async def test_strangers_are_not_let_in(world: World, town: Town) -> None:
    replica = await town.add(world)
    strange = cluster_keys.channel_credentials(b"x" * 32)
    no_pair = grpc.ssl_channel_credentials(cluster_keys._own_pair(SECRET)[0])
    for credentials in (strange, no_pair, None):
        address = replica.endpoint.address
        channel = (
            grpc.aio.insecure_channel(address)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=cluster_keys.CHANNEL_OPTIONS)
        )
        async with channel:
            call = channel.stream_stream(f"/{SERVICE}/Work")(timeout=10)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() == Status.UNAVAILABLE


async def test_requests_of_a_replica_that_dies_are_answered_by_another(
    world: World, town: Town
) -> None:
    first, second = await town.add(world), await town.add(world)
    second.loads[0] = 10**6  # so that all go to the first
    acts = world.rows((5,), 1)
    async with backend_of(town) as backend:
        with first.layers.held():
            calls = [asyncio.create_task(ask(backend, world.offload_of(acts))) for _ in range(5)]
            await asyncio.to_thread(first.layers.entered.wait)
            await until(lambda: first.server.at_work == 5)
            await first.die()
            outcomes = await asyncio.gather(*calls)
        for outcome in outcomes:
            completion = completion_from_pb(pb.OffloadReply.FromString(outcome.payload))
            assert_same(completion, world.local(acts), exactly=False)
        await answered(backend, world)


async def test_without_a_replica_requests_wait_a_little_and_are_unavailable(
    world: World, town: Town
) -> None:
    replica = await town.add(world)
    async with backend_of(town) as backend:
        for pool in backend._routes.pools("toy"):
            pool._retry_s = 0.05
        await replica.die()
        await until(lambda: not any(link.usable for link in backend.links.values()))
        with pytest.raises(CloudUnavailable, match=r"answered within 0\.05 s; retry later"):
            await ask(backend, world.offload())
        assert await backend.probe("toy", 1.0) == []


async def test_a_replica_that_comes_while_requests_wait_answers_them(
    world: World, town: Town
) -> None:
    replica = await town.add(world)
    async with backend_of(town) as backend:
        await replica.die()
        await until(lambda: not any(link.usable for link in backend.links.values()))
        waiting = asyncio.create_task(ask(backend, world.offload()))
        await town.add(world)
        assert not (await waiting).code


async def test_a_replica_that_leaves_finishes_what_it_has_and_gets_nothing_new(
    world: World, town: Town
) -> None:
    old = await town.add(world)
    async with backend_of(town) as backend:
        with old.layers.held():
            call = asyncio.create_task(ask(backend, world.offload()))
            await asyncio.to_thread(old.layers.entered.wait)
            new = await town.add(world)
            await until(lambda: sum(link.usable for link in backend.links.values()) == 2)
            leaving = asyncio.create_task(old.server.close(20.0))
            await until(lambda: sum(link.usable for link in backend.links.values()) == 1)
            for _ in range(4):
                await answered(backend, world)
            assert old.server.at_work == 1
            assert not leaving.done()
        assert not (await call).code
        await leaving
        assert len({depth for depth, _ in new.layers.runs}) == 3
        del town.listed[old.endpoint.name]
        await until(lambda: list(backend.links) == [new.endpoint.name])


async def test_a_request_that_nobody_waits_for_is_dropped(world: World, town: Town) -> None:
    replica = await town.add(world)
    async with backend_of(town) as backend:
        with replica.layers.held():
            first = asyncio.create_task(ask(backend, world.offload()))
            await asyncio.to_thread(replica.layers.entered.wait)
            second = asyncio.create_task(ask(backend, world.offload((6,) * 4)))
            await until(lambda: replica.server.at_work == 2)
            second.cancel()
            await until(lambda: replica.server.at_work == 1)
        assert not (await first).code
        await answered(backend, world)
        assert (1, 4) not in replica.layers.runs


async def test_the_one_with_less_work_left_is_asked(world: World, town: Town) -> None:
    idle, busy = await town.add(world), await town.add(world)
    busy.loads[0] = 10**6
    async with backend_of(town) as backend:
        for _ in range(8):
            await answered(backend, world)
        assert len(idle.layers.runs) > 8
        assert not busy.layers.runs


async def test_a_device_gets_the_version_that_it_holds(
    world: World, newer: World, town: Town
) -> None:
    await town.add(world, order=1)
    await town.add(newer, order=2)
    assert world.bundle.digest(1) != newer.bundle.digest(1)
    async with backend_of(town) as backend:
        assert backend.bundles == ("toy",)
        for _ in range(4):
            await answered(backend, world)
            await answered(backend, newer)
        for each in (world, newer):
            hello = Hello("toy", {1: each.bundle.digest(1)}, ())
            request = hello_to_pb(hello).SerializeToString()
            outcome = await backend.hello("toy", hello.digests.values(), request, 5_000.0)
            assert not outcome.code, outcome.message


async def test_a_device_with_an_unknown_version_is_told_by_the_newest(
    world: World, newer: World, town: Town
) -> None:
    await town.add(world, order=1)
    await town.add(newer, order=2)
    async with backend_of(town) as backend:
        outcome = await ask(backend, world.offload(digest=b"\1" * 16))
        assert outcome.status == Status.FAILED_PRECONDITION
        hello = Hello("toy", {1: b"\1" * 16}, ())
        request = hello_to_pb(hello).SerializeToString()
        outcome = await backend.hello("toy", hello.digests.values(), request, 5_000.0)
        assert outcome.status == Status.FAILED_PRECONDITION
        assert newer.bundle.digest(1).hex() in outcome.message


async def test_a_version_whose_replicas_are_gone_is_unavailable_not_unknown(
    world: World, newer: World, town: Town
) -> None:
    """Its devices would give up on a mismatch; they are to come back."""
    old = await town.add(world, order=1)
    await town.add(newer, order=2)
    async with backend_of(town) as backend:
        del town.listed[old.endpoint.name]
        await until(lambda: len(backend.links) == 1)
        for pool in backend._routes.pools("toy"):
            pool._retry_s = 0.05
        with pytest.raises(CloudUnavailable):
            await ask(backend, world.offload())
        await answered(backend, newer)


async def test_without_its_directory_a_gateway_goes_on_with_whom_it_knows(
    world: World, town: Town
) -> None:
    await town.add(world)
    async with backend_of(town) as backend:
        town.down = True
        await asyncio.sleep(0.1)  # several looks
        await answered(backend, world)
        town.down = False
        await town.add(world)
        await until(lambda: sum(link.usable for link in backend.links.values()) == 2)


async def test_a_replica_that_says_nothing_is_not_used(world: World, town: Town) -> None:
    async def mute(requests: Any, context: Any) -> None:
        await asyncio.Event().wait()

    handlers = {"Work": grpc.stream_stream_rpc_method_handler(mute)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_secure_port("127.0.0.1:0", cluster_keys.server_credentials(SECRET))
    await server.start()
    speaking = await town.add(world)
    async with backend_of(town) as backend:
        silent = replace(speaking.endpoint, name="silent", address=f"127.0.0.1:{port}")
        town.listed["silent"] = silent
        await until(lambda: len(backend.links) == 2)
        for _ in range(4):
            await answered(backend, world)
        assert not backend.links["silent"].usable
    await server.stop(0)


async def test_requests_of_a_replica_that_falls_silent_are_answered_by_another(
    world: World, town: Town
) -> None:
    stuck, well = await town.add(world, heartbeat_s=60.0), await town.add(world)
    well.loads[0] = 10**6
    async with backend_of(town) as backend:
        with stuck.layers.held():
            call = asyncio.create_task(ask(backend, world.offload()))
            await asyncio.to_thread(stuck.layers.entered.wait)
            assert not (await call).code
            assert well.layers.runs


async def test_what_would_be_late_is_refused_with_when_to_come_again(
    world: World, town: Town
) -> None:
    replica = await town.add(world)
    async with backend_of(town) as backend:
        await answered(backend, world)
        (link,) = backend.links.values()
        await until(lambda: link.capacity > 0)
        replica.loads[0] = round(10 * link.capacity)  # ten seconds of work
        await until(lambda: link.load > 5 * link.capacity)
        with pytest.raises(CloudBusy, match="retry later") as caught:
            await ask(backend, world.offload(), budget_ms=1_000.0)
        assert 1_000 < caught.value.retry_after_ms < 60_000
        assert not (await ask(backend, world.offload(), budget_ms=60_000.0)).code


async def test_a_backend_without_replicas_does_not_start(town: Town) -> None:
    with pytest.raises(CloudUnavailable, match="none of 0 replicas"):
        async with backend_of(town):
            pass


def test_a_secret_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 32"):
        cluster_keys.server_credentials(b"short")


def test_an_endpoint_survives_its_packing(tmp_path: Path) -> None:
    there = Endpoint("a", "127.0.0.1:1", "app", "toy", 2.5, {"0f": 0, "aa": 3})
    assert Endpoint.unpacked(there.packed()) == there
    assert there.version == "0f"
