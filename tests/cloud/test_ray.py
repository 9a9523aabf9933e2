"""`offramp cloud serve` with two replicas in a Ray of its own. In this order: the last test ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cloud_world import Served, World, alive, assert_same, replicas, wait_until

from offramp_common.certs import channel_credentials
from offramp_common.messages import completion_from_pb, offload_to_pb
from offramp_common.wire import offload_pb2_grpc as pb_grpc

pytestmark = pytest.mark.ray
Status = grpc.StatusCode
_STUCK_S = 3.0  # six of these requests together take a tenth of a second


@pytest.fixture
async def stub(ray_cloud: Served, tls_dir: Path) -> AsyncIterator[Any]:
    pair = (tls_dir / "kiosk-7.pem", tls_dir / "kiosk-7.key")
    credentials = channel_credentials(tls_dir / "ca.pem", *pair)
    async with grpc.aio.secure_channel(ray_cloud.address, credentials) as channel:
        yield pb_grpc.OffloadServiceStub(channel)


async def test_a_replica_answers_as_the_device_would(world: World, stub: Any) -> None:
    for depth in range(4):
        for seed in range(3):
            acts = world.rows((5, 9, 3), depth, seed)
            reply = await stub.Complete(offload_to_pb(world.offload_of(acts)), timeout=30)
            assert_same(completion_from_pb(reply), world.local(acts), exactly=False)


async def test_both_replicas_are_up_and_share_the_work(
    world: World, stub: Any, ray_cloud: Served
) -> None:
    assert len(set(ray_cloud.ready["replica_pids"])) == 2
    acts = world.rows((12,), 1)
    work = offload_to_pb(world.offload_of(acts))
    replies = await asyncio.gather(*(stub.Complete(work, timeout=30) for _ in range(64)))
    for reply in replies:
        assert_same(completion_from_pb(reply), world.local(acts), exactly=False)


async def test_errors_cross_ray_with_status_and_message(world: World, stub: Any) -> None:
    for settings, status, message in (
        ({"digest": b"\1" * 16}, Status.FAILED_PRECONDITION, "offramp bundle digest"),
        ({"frame": b"garbage"}, Status.INVALID_ARGUMENT, "not a frame"),
        ({"bundle": "other"}, Status.NOT_FOUND, "served: toy"),
        ({"deadline_ms": 0.1}, Status.DEADLINE_EXCEEDED, "0 ms passed"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Complete(offload_to_pb(world.offload(**settings)), timeout=30)
        assert (caught.value.code(), message in (caught.value.details() or "")) == (status, True)


async def test_a_replica_killed_under_its_requests_costs_none_of_them(
    world: World, stub: Any, ray_cloud: Served
) -> None:
    acts = world.rows([60] * 64, 0)
    work = offload_to_pb(world.offload_of(acts))
    # Worked out once: callers that stop to calculate leave both replicas idle when one is killed.
    expected = world.local(acts)
    outcomes: Counter[Any] = Counter()
    asked_s: dict[int, float] = {}  # by caller, when its request under way was sent
    enough = asyncio.Event()

    async def caller(number: int) -> None:
        while not enough.is_set():
            asked_s[number] = time.monotonic()
            try:
                reply = await stub.Complete(work, timeout=30)
                assert_same(completion_from_pb(reply), expected, exactly=False)
                outcomes[Status.OK] += 1
            except grpc.aio.AioRpcError as error:
                outcomes[error.code()] += 1

    before = await asyncio.to_thread(replicas, ray_cloud)
    callers = [asyncio.create_task(caller(number)) for number in range(6)]
    await asyncio.to_thread(wait_until, lambda: outcomes.total() > 6, 60)

    def stopped_at_work() -> bool:
        """Whether a request from before is still under way long after: it waits in the stopped replica."""
        os.kill(min(before), signal.SIGSTOP)
        stopped_s = time.monotonic()
        while min(asked_s.values()) < stopped_s:
            if time.monotonic() - stopped_s > _STUCK_S:
                return True
            time.sleep(0.01)
        os.kill(min(before), signal.SIGCONT)
        return False

    # Stopped first, and killed once requests surely wait there: one that is idle may get none.
    await asyncio.to_thread(wait_until, stopped_at_work, 60)
    os.kill(min(before), signal.SIGKILL)
    started = outcomes.total()
    await asyncio.to_thread(wait_until, lambda: outcomes.total() > started + 12, 60)
    enough.set()
    await asyncio.gather(*callers)
    # Each was retried on the other replica; had that been too slow, it would be UNAVAILABLE.
    assert outcomes.keys() <= {Status.OK, Status.UNAVAILABLE}
    assert outcomes[Status.OK] > 12
    assert any("died under a request" in line for line in ray_cloud.log)

    def replaced() -> bool:
        return len(replicas(ray_cloud) - {min(before)}) == 2

    await asyncio.to_thread(wait_until, replaced, 60)
    await stub.Complete(work, timeout=30)


def test_sigterm_ends_all_of_it_with_0(ray_cloud: Served) -> None:
    family = ray_cloud.family()
    raylets = [command for command in alive(family).values() if "raylet" in command]
    folder = Path(re.findall(r"(/\S*?offramp-\w+)", " ".join(raylets))[0])
    assert folder.is_dir()
    assert ray_cloud.stop() == 0
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not alive(family))
    assert not alive(family)
    assert not folder.exists()
