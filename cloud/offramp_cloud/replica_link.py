"""A gateway's stream to one replica: proto/replica.proto from the other side."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import msgpack

from offramp_cloud import cluster_keys
from offramp_cloud.replica_server import SERVICE, WINDOW, joined
from offramp_cloud.statuses import Outcome
from offramp_common.errors import CloudUnavailable
from offramp_common.wire import replica_pb2 as pb

log = logging.getLogger(__name__)

SILENCE_S = 3.0
"""A replica that says nothing for so long is as good as dead: six times its heartbeat."""
_AGAIN_S = (0.05, 1.0)  # the first wait before a lost replica is tried again, and the longest
_WORK = f"/{SERVICE}/Work"
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_BROKEN = (grpc.aio.AioRpcError, asyncio.InvalidStateError)  # how a stream that ends shows
_OPTIONS = (
    *WINDOW,
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    *cluster_keys.CHANNEL_OPTIONS,
)


class ReplicaGone(CloudUnavailable):
    """The replica died, or fell silent, with the call."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A replica, as it registers itself once it can answer.

    name     of its Ray actor;  address  HOST:PORT of its own port;  app  its Serve application
    order    newer versions of a bundle have higher ones
    depths   digest (hex) -> depth, of each part of the model that it can run
    """

    name: str
    address: str
    app: str
    bundle: str
    order: float
    depths: dict[str, int]

    @property
    def version(self) -> str:
        """The digest of the whole model, hex."""
        return min(self.depths, key=lambda digest: self.depths[digest])

    def packed(self) -> bytes:
        return bytes(msgpack.packb(asdict(self)))

    @classmethod
    def unpacked(cls, data: bytes) -> Endpoint:
        return cls(**msgpack.unpackb(data))


class ReplicaLink:
    """Connects, and connects again, until closed. One event loop."""

    def __init__(
        self,
        endpoint: Endpoint,
        credentials: grpc.ChannelCredentials,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called when `usable` may have changed."""
        self.endpoint = endpoint
        self._on_change = on_change
        self.draining = False
        self.up = asyncio.Event()
        self.capacity = 0.0  # layers x tokens a second
        self._last_id = self._seen_id = 0  # sent, and seen by the replica at its last report
        self._pending: dict[int, asyncio.Future[Outcome]] = {}
        self._out: list[pb.Call] = []
        self._more = asyncio.Event()
        self._heard_s = 0.0
        self._work_left = 0.0  # as last reported
        self._call_cost = 1.0  # of one call
        self._channel = grpc.aio.secure_channel(endpoint.address, credentials, options=_OPTIONS)
        self._running = asyncio.create_task(self._run())

    @property
    def usable(self) -> bool:
        return self.up.is_set() and not self.draining

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    @property
    def load(self) -> float:
        """Work before a call that would be sent now: layers x tokens, as far as they are known."""
        return self._work_left + (self._last_id - self._seen_id) * self._call_cost

    async def call(self, method: pb.Method, payload: bytes, budget_ms: float) -> Outcome:
        """What the replica answers. Raises ReplicaGone; cancelling it cancels the call there."""
        if not self.up.is_set():
            raise ReplicaGone(f"replica {self.endpoint.address} is not connected; retry later")
        number = self._last_id = self._last_id + 1
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        self._send(
            pb.Call(id=number, method=method, budget_ms=min(budget_ms, 1e9), payload=payload)
        )
        try:
            return await future
        except asyncio.CancelledError:
            if self.up.is_set():
                self._send(pb.Call(id=number, method=pb.METHOD_CANCEL))
            raise
        finally:
            self._pending.pop(number, None)

    async def close(self, drain_s: float = 0.0) -> None:
        """Send nothing new, wait for what is at work, for `drain_s` at most."""
        self.draining = True
        until_s = time.monotonic() + drain_s
        while self._pending and time.monotonic() < until_s:  # noqa: ASYNC110 - rare, and short
            await asyncio.sleep(0.02)
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self._channel.close(None)

    def _send(self, call: pb.Call) -> None:
        self._out.append(call)
        self._more.set()

    async def _run(self) -> None:
        wait_s = _AGAIN_S[0]
        while not self.draining:
            heard_s = self._heard_s
            try:
                await self._converse()
            finally:
                self._lost()
            wait_s = _AGAIN_S[0] if self._heard_s > heard_s else min(2 * wait_s, _AGAIN_S[1])
            await asyncio.sleep(wait_s)

    async def _converse(self) -> None:
        """One stream, from its start until it ends, breaks or falls silent."""
        self._heard_s = time.monotonic()
        work: Any = self._channel.stream_stream  # grpc-stubs know less of it than it does
        stream: Any = work(_WORK)()
        tasks = [
            asyncio.create_task(work)
            for work in (self._read(stream), self._write(stream), self._watch())
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stream.cancel()
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception) and not isinstance(ended, _BROKEN):
                    log.error("the link to replica %s", self.endpoint.address, exc_info=ended)

    def _lost(self) -> None:
        self.up.clear()
        self._on_change()
        self._out.clear()
        self._work_left, self._seen_id = 0.0, self._last_id
        for outcome in self._pending.values():
            if not outcome.done():
                outcome.set_exception(
                    ReplicaGone(f"replica {self.endpoint.address} died under a request")
                )

    async def _watch(self) -> None:
        while (left_s := self._heard_s + SILENCE_S - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left_s)

    async def _write(self, stream: Any) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            while self._out:
                sent, self._out = joined(self._out)
                await stream.write(pb.Calls(calls=sent).SerializeToString())
            if self.draining and not self._pending:
                await stream.done_writing()

    async def _read(self, stream: Any) -> None:
        while (raw := await stream.read()) is not _EOF:
            message = pb.Results.FromString(raw)
            self._heard_s = time.monotonic()
            for result in message.results:
                self._answered(result)
            self._reported(message)
            if not self.up.is_set():
                self.up.set()
                self._on_change()

    def _answered(self, result: pb.Result) -> None:
        outcome = self._pending.pop(result.id, None)
        if outcome is not None and not outcome.done():
            outcome.set_result(
                Outcome(result.payload, result.code, result.message, result.retry_after_ms)
            )

    def _reported(self, message: pb.Results) -> None:
        if message.draining and not self.draining:
            log.info("replica %s is leaving", self.endpoint.address)
            self.draining = True
            self._on_change()
        self._work_left, self._seen_id = float(message.work_left), message.seen_id
        self.capacity = message.capacity
        if message.work_left and message.calls:
            self._call_cost += (message.work_left / message.calls - self._call_cost) / 16
        if self.draining and not self._pending:
            self._more.set()  # the writer ends the stream
