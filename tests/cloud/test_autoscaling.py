"""Ray Serve asks our policy for the number of replicas: a burst brings one more, quiet takes it away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cloud_world import Served, World, replicas, serving, wait_until
from toy_models import toy_bundle

from offramp_common.messages import offload_to_pb
from offramp_common.wire import offload_pb2_grpc as pb_grpc

pytestmark = pytest.mark.ray
_CALLERS = 8
_CHANGES_S = 90.0  # a new process imports torch, on a machine that has other work


@pytest.fixture(scope="module")
def elastic(
    may_use_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[World, Served]]:
    """One replica, two at most. A Ray of its own: that of the other tests has a fixed number."""
    path: Path = tmp_path_factory.mktemp("elastic") / "toy"
    world = World(toy_bundle(path, "deebert", n_layers=4))
    arguments = ["--bundle", str(path), "--insecure", "--metrics", "127.0.0.1:0", "--cpus", "0.1"]
    arguments += ["--replicas", "1", "--max-replicas", "2", "--scale-down-s", "1"]
    with serving(arguments) as served:
        yield world, served


async def test_a_burst_brings_a_replica_and_quiet_takes_it_away(
    elastic: tuple[World, Served],
) -> None:
    world, served = elastic
    work = offload_to_pb(world.offload_of(world.rows([60] * 64, 0)))
    enough = asyncio.Event()

    def there(number: int) -> bool:
        return len(replicas(served)) == number

    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = pb_grpc.OffloadServiceStub(channel)

        async def caller() -> None:
            while not enough.is_set():
                await stub.Complete(work, timeout=60)

        assert there(1)
        callers = [asyncio.create_task(caller()) for _ in range(_CALLERS)]
        await asyncio.to_thread(wait_until, lambda: there(2), _CHANGES_S)
        enough.set()
        await asyncio.gather(*callers)
        await asyncio.to_thread(wait_until, lambda: there(1), _CHANGES_S)
        await stub.Complete(work, timeout=60)
