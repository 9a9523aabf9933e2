"""A worker that is closed leaves nothing: no connection waits for some garbage collection."""

from __future__ import annotations

import asyncio
import gc
import math
import os
from pathlib import Path

import pytest
from edge_cloud import TorchAsNumpy, cloud_of

from offramp_common.bundle import Bundle
from offramp_edge import EdgeWorker


def sockets() -> int:
    """Of this process, in which both ends of every connection are."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(entry).startswith("socket:")
        except OSError:
            continue  # the folder's own descriptor, or one that has just been closed
    return count


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list them")
async def test_no_connection_outlives_its_worker(bundle: Bundle, layers: TorchAsNumpy) -> None:
    gc.collect()
    gc.disable()
    try:
        async with cloud_of(bundle) as cloud:
            before = sockets()
            for _ in range(4):
                worker = EdgeWorker(
                    bundle,
                    cloud.address,
                    layers=layers,
                    split=2,
                    exits=False,
                    hedge_after=math.inf,
                )
                async with worker:
                    answer = await worker.answer_async("w1 w2")
                    assert answer.where == "cloud"
                    assert sockets() > before
            async with asyncio.timeout(20):  # the gateway hears of it a moment later
                while sockets() > before:  # noqa: ASYNC110 - what is waited for has no event
                    await asyncio.sleep(0.05)
    finally:
        gc.enable()
