"""A replica's own gRPC port: requests from gateways, past Serve. proto/replica.proto has the words."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import msgpack

from offramp_cloud.rates import Work
from offramp_cloud.statuses import Outcome
from offramp_common.wire import replica_pb2 as pb

if TYPE_CHECKING:
    from offramp_cloud.host import Host  # with torch; a gateway needs the words alone

SERVICE: str = pb.DESCRIPTOR.services_by_name["ReplicaService"].full_name
HEARTBEAT_S = 0.5
"""A replica is never silent for longer than that, while it lives and its machine lets it run."""
WINDOW = (
    # A frame is sent whole, without waiting for the other side's leave in the middle: both are ours.
    ("grpc.http2.lookahead_bytes", 4 * 2**20),
    ("grpc.http2.bdp_probe", 0),
)
OPTIONS = (
    *WINDOW,
    ("grpc.max_receive_message_length", -1),  # the gateway has bounded what is in it
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),  # a gateway that went without a word is found out
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_JOINED_BYTES = 2**20  # what is beyond it waits for the next message

M = TypeVar("M", pb.Call, pb.Result)


class ReplicaServer:
    """start(), ... close(). One event loop, the engine's."""

    def __init__(
        self,
        host: Host,
        credentials: grpc.ServerCredentials,
        work: Callable[[], Work],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """`work`: what the engine has before it now (rates.Rates)."""
        self._host, self._credentials, self._work_now = host, credentials, work
        self._heartbeat_s = heartbeat_s
        self._sessions: set[_Session] = set()
        self._server: grpc.aio.Server | None = None
        self.draining = False

    @property
    def at_work(self) -> int:
        """Calls that have no result yet, or one that has not been sent."""
        return sum(session.open_calls for session in self._sessions)

    async def start(self, node: str) -> str:
        """Listen on a free port of this node's address; returns HOST:PORT."""
        self._server = grpc.aio.server(options=OPTIONS)
        handlers = {"Work": grpc.stream_stream_rpc_method_handler(self._work)}
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        host = f"[{node}]" if ":" in node else node
        port = self._server.add_secure_port(f"{host}:0", self._credentials)
        await self._server.start()
        return f"{host}:{port}"

    async def close(self, drain_s: float = 0.0) -> None:
        """Tell the gateways, finish what they have sent, for `drain_s` at most."""
        self.draining = True
        for session in self._sessions:
            session.wake()
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                # Gateways end their streams once these owe them nothing; new calls may be on the way.
                while self._sessions:  # noqa: ASYNC110 - streams end elsewhere
                    await asyncio.sleep(0.02)
        if self._server is not None:
            await self._server.stop(0)

    async def _work(self, requests: AsyncIterator[bytes], context: Any) -> None:
        session = _Session(self._host, self._rest, self._heartbeat_s)
        self._sessions.add(session)
        try:
            await session.run(requests, context)
        finally:
            self._sessions.discard(session)

    def _rest(self) -> dict[str, Any]:
        work = self._work_now()
        return {
            "work_left": work.left,
            "capacity": work.capacity,
            "calls": self.at_work,
            "draining": self.draining,
        }


class _Session:
    """One gateway's stream."""

    def __init__(self, host: Host, rest: Callable[[], dict[str, Any]], heartbeat_s: float) -> None:
        """`rest`: what stands in every message beside the results."""
        self._host, self._rest, self._heartbeat_s = host, rest, heartbeat_s
        self._seen_id = 0
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._done: list[pb.Result] = []
        self._woken = asyncio.Event()
        self._woken.set()  # the first message says that we are here

    @property
    def open_calls(self) -> int:
        return len(self._tasks) + len(self._done)

    def wake(self) -> None:
        self._woken.set()

    async def run(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Until the gateway ends the stream, or it breaks: then its calls are cancelled."""
        reading = asyncio.create_task(self._read(requests))
        reading.add_done_callback(lambda _: self.wake())
        try:
            while not reading.done() or self.open_calls:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._heartbeat_s):
                        await self._woken.wait()
                self._woken.clear()
                await context.write(self._results().SerializeToString())
            reading.result()
        finally:
            reading.cancel()
            for task in self._tasks.values():
                task.cancel()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        async for raw in requests:
            for call in pb.Calls.FromString(raw).calls:
                self._seen_id = max(self._seen_id, call.id)
                if call.method == pb.METHOD_CANCEL:
                    if (unwanted := self._tasks.get(call.id)) is not None:
                        unwanted.cancel()
                else:
                    task = self._tasks[call.id] = asyncio.create_task(self._answer(call))
                    task.add_done_callback(partial(self._over, call.id))

    async def _answer(self, call: pb.Call) -> None:
        outcome = await self._outcome(call)
        self._done.append(
            pb.Result(
                id=call.id,
                code=outcome.code,
                message=outcome.message,
                retry_after_ms=outcome.retry_after_ms,
                payload=outcome.payload,
            )
        )

    def _over(self, number: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number]
        self.wake()

    async def _outcome(self, call: pb.Call) -> Outcome:
        if call.method == pb.METHOD_COMPLETE:
            return await self._host.complete(call.payload, call.budget_ms)
        if call.method == pb.METHOD_HELLO:
            return self._host.hello(call.payload)
        return Outcome(msgpack.packb({"pid": os.getpid(), "counters": self._host.counters()}))

    def _results(self) -> pb.Results:
        sent, self._done = joined(self._done)
        if self._done:
            self.wake()
        return pb.Results(results=sent, seen_id=self._seen_id, **self._rest())


def joined(waiting: list[M]) -> tuple[list[M], list[M]]:
    """The calls or results that go into the next message, at least one if any waits; and the rest."""
    nbytes = 0
    for count, each in enumerate(waiting):
        nbytes += len(each.payload)
        if nbytes > _JOINED_BYTES and count:
            return waiting[:count], waiting[count:]
    return waiting, []
