"""Devices that never stop asking, and check what they are told: the load of cluster_life.py."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from offramp_cloud.engine import load_engine
from offramp_common.activations import Activations
from offramp_common.bundle import Bundle
from offramp_common.frames import encode_frame
from offramp_common.messages import offload_to_pb
from offramp_common.transport import Offload
from offramp_common.wire import offload_pb2 as pb
from offramp_common.wire import offload_pb2_grpc as pb_grpc

DEVICES, TOKENS = 8, 16
_ANSWER_S, _TRY_S = 20.0, 5.0
_AGAIN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
}


@dataclass
class Version:
    """What devices of one version send, and the answers (logits) they should get."""

    request: pb.OffloadRequest
    answers: bytes

    def right(self, reply: pb.OffloadReply) -> bool:
        got, wanted = (np.frombuffer(each, "<f4") for each in (reply.answers, self.answers))
        return got.shape == wanted.shape and bool(np.allclose(got, wanted, atol=1e-4, rtol=1e-4))


async def version_of(bundle: Bundle) -> Version:
    """The same token ids for both versions, so that answers of the wrong one show."""
    engine = load_engine(bundle.path)
    ids = np.random.default_rng(0).integers(0, 32, (1, TOKENS, bundle.cuts[0].width))
    frame = encode_frame(Activations(ids, np.array([TOKENS]), depth=0), bundle.cuts[0], "fp32")
    work = Offload("r", "tiny", bundle.digest(0), frame)
    done = await engine.complete(work)
    await engine.close()
    return Version(offload_to_pb(work), done.answers.astype("<f4").tobytes())


@dataclass
class Tally:
    """What devices saw during a stage."""

    requests: int = 0
    of_newer: int = 0  # requests of devices that hold the newest version
    failed: int = 0
    wrong: int = 0
    again: int = 0
    slowest_ms: float = 0.0
    silence_ms: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    _answered_s: float = field(default_factory=time.monotonic, repr=False)

    def add(self, ok: bool, right: bool, newer: bool, took_s: float) -> None:
        now_s = time.monotonic()
        self.requests += 1
        self.of_newer += newer
        self.failed += not ok
        self.wrong += ok and not right
        self.slowest_ms = max(self.slowest_ms, took_s * 1e3)
        if ok:
            self.silence_ms = max(self.silence_ms, (now_s - self._answered_s) * 1e3)
            self._answered_s = now_s

    def to_json(self) -> dict[str, Any]:
        return {
            name: round(value, 1) if isinstance(value, float) else value
            for name, value in vars(self).items()
            if not name.startswith("_")
        }


class Load:
    """Devices that never stop."""

    def __init__(self, gateways: list[str], versions: list[Version]) -> None:
        self.versions, self.tally = versions, Tally()
        options = [
            ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.initial_reconnect_backoff_ms", 50),
        ]
        self._channels = [grpc.aio.insecure_channel(each, options=options) for each in gateways]
        self._stubs: list[Any] = [
            pb_grpc.OffloadServiceStub(channel)  # type: ignore[no-untyped-call]
            for channel in self._channels
        ]
        self._tasks = [asyncio.create_task(self._device(number)) for number in range(DEVICES)]

    async def is_served(self, version: Version) -> bool:
        try:
            await self._stubs[0].Complete(version.request, timeout=_TRY_S)
        except grpc.aio.AioRpcError:
            return False
        return True

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close(None)

    async def _device(self, number: int) -> None:
        rng = random.Random(number)
        while True:
            version = self.versions[number % len(self.versions)]
            started_s = time.monotonic()
            reply = await self._ask(version, rng.randrange(len(self._stubs)))
            took_s = time.monotonic() - started_s
            right = reply is not None and version.right(reply)
            newer = version is not self.versions[0]
            self.tally.add(reply is not None, right, newer, took_s)

    async def _ask(self, version: Version, gateway: int) -> pb.OffloadReply | None:
        until_s = time.monotonic() + _ANSWER_S
        while time.monotonic() < until_s:
            try:
                reply: pb.OffloadReply = await self._stubs[gateway].Complete(
                    version.request, timeout=_TRY_S
                )
                return reply
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {(error.details() or '')[:80]}"
                self.tally.reasons[reason] = self.tally.reasons.get(reason, 0) + 1
                if error.code() not in _AGAIN:
                    return None
                self.tally.again += 1
                gateway = (gateway + 1) % len(self._stubs)
                await asyncio.sleep(0.02)
        return None
