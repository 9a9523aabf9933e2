"""The service of proto/offload.proto over a Backend.

Requests stay bytes: their few header fields are read here, the frame is passed on untouched.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from offramp_cloud.admission import Admission, Entrance
from offramp_cloud.backends import Backend
from offramp_cloud.device_stream import MAX_MESSAGE, MAX_SHOWN, DeviceStream
from offramp_cloud.identity import Caller, caller_of
from offramp_cloud.served import Observer, Served
from offramp_cloud.stalls import IDLE, REPLY, Stalls
from offramp_cloud.statuses import Outcome, UnknownBundle, failure, parsed
from offramp_common.errors import CloudUnavailable, DeadlineExceeded
from offramp_common.revocation import Revocations
from offramp_common.wire import offload_pb2 as pb

SERVICE: str = pb.DESCRIPTOR.services_by_name["OffloadService"].full_name
PUSHBACK = "grpc-retry-pushback-ms"  # gRPC's own word for it, in trailing metadata
_Work = Callable[[bytes, Caller, Served, float], Coroutine[Any, Any, Outcome]]
"""Of one method: the request, who asks, the record to fill in, and the seconds there are."""
_DRAINING = "the cloud is shutting down; connect again for another one"


class Servicer:
    """Raw handlers: bytes in, bytes out."""

    def __init__(
        self,
        backend: Backend,
        admission: Admission,
        observers: Sequence[Observer] = (),
        unserved: Callable[[], Collection[str]] = tuple,
        revocations: Revocations | None = None,
    ) -> None:
        """`unserved`: bundles without a replica at the moment; their requests are refused at once,
        where waiting would cost each device its deadline."""
        self._backend, self._admission, self._observers = backend, admission, observers
        self._unserved = unserved
        self._entrance = Entrance(admission, revocations)
        self.stalls = Stalls(admission.stall_timeout_s)
        self.at_work = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Without (de)serializers, so that a malformed message gets a status of ours."""
        handlers = {
            # One request each. gRPC's own way for them waits for it for ever, before any of our code.
            "Hello": grpc.stream_unary_rpc_method_handler(self.hello),
            "Complete": grpc.stream_unary_rpc_method_handler(self.complete),
            "CompleteStream": grpc.stream_stream_rpc_method_handler(self.complete_stream),
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, end streams once theirs are answered; True when all were in time."""
        self._draining.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def hello(self, _: AsyncIterator[bytes], context: Any) -> bytes:
        return await self._unary(self._hello, context)

    async def complete(self, _: AsyncIterator[bytes], context: Any) -> bytes:
        return await self._unary(self._complete, context)

    async def _unary(self, work: _Work, context: Any) -> bytes:
        raw = await self.stalls.request(context)
        caller = caller_of(context)
        served = _record(caller, context)
        outcome = await self._served(served, work(raw, caller, served, _remaining_s(context)))
        self.stalls.replies(context, caller)
        return await _reply_or_abort(outcome, context)

    async def complete_stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Reads while slots are free. A broken stream cancels this, and with it all its requests."""
        caller = caller_of(context)

        def begin(raw: bytes) -> tuple[Served, Coroutine[Any, Any, Outcome]]:
            served = _record(caller, context)
            work = self._complete(raw, caller, served, _remaining_s(context))
            return served, self._served(served, work)

        stream = DeviceStream(
            context.write,
            begin,
            self._draining,
            self._admission.in_flight_per_stream,
            self.stalls.timeout_s,
            self._admission.idle_timeout_s,
        )
        ended = await stream.run(requests)
        if ended == REPLY:
            await self.stalls.end(context, caller)
        elif ended == IDLE:
            self.stalls.ended[IDLE] += 1  # and is OK: the next request opens another one
        elif self._draining.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, _DRAINING)

    async def _served(self, served: Served, work: Coroutine[Any, Any, Outcome]) -> Outcome:
        """`work`'s outcome, its errors as statuses; however it ends, the observers hear of it."""
        served.began_s = time.monotonic()
        self.at_work += 1
        self._idle.clear()
        try:
            try:
                outcome = await work
            except Exception as error:  # noqa: BLE001 - becomes a status; a bug is logged there
                outcome = failure(error)
            served.status, served.message = outcome.status.name, outcome.message
            return outcome
        finally:
            self.at_work -= 1
            if not self.at_work:
                self._idle.set()
            served.ms = (time.monotonic() - served.began_s) * 1e3
            for observe in self._observers:
                observe(served)

    async def _hello(
        self, raw: bytes, caller: Caller, served: Served, patience_s: float
    ) -> Outcome:
        self._entrance.check(caller)
        served.nbytes = len(raw)
        header = parsed(pb.HelloRequest, raw)
        served.bundle = self._known(header.bundle)
        digests = {entry.digest for entry in header.digests}
        patience_s = min(patience_s, self._admission.max_wait_s)
        with self._entrance.room_for(caller, len(raw)):
            async with _patient(patience_s):
                return await self._backend.hello(served.bundle, digests, raw, patience_s * 1e3)

    async def _complete(
        self, raw: bytes, caller: Caller, served: Served, patience_s: float
    ) -> Outcome:
        served.nbytes = len(raw)
        header = parsed(pb.OffloadRequest, raw)
        served.request_id = header.request_id[:MAX_SHOWN]
        self._entrance.check(caller)
        served.traceparent = header.traceparent[:MAX_SHOWN] or served.traceparent
        served.bundle, digest = self._known(header.bundle), header.digest
        deadline_s = header.deadline_ms / 1e3 if header.deadline_ms > 0 else math.inf
        del header  # and its copy of the frame
        patience_s = min(patience_s, deadline_s, self._admission.max_wait_s)
        with self._entrance.room_for(caller, len(raw)):
            async with _patient(patience_s):
                outcome = await self._backend.complete(served.bundle, digest, raw, patience_s * 1e3)
        if not outcome.code:
            reply = pb.OffloadReply.FromString(outcome.payload)
            served.exit_depths, served.rows = tuple(reply.exit_depths), len(reply.exit_depths)
            served.queue_ms, served.compute_ms = reply.queue_ms, reply.compute_ms
            served.reply_nbytes = len(outcome.payload)
            depth = self._backend.depth_of(served.bundle, digest) or 0
            self._entrance.charge(caller, sum(served.exit_depths) - depth * served.rows)
        return outcome

    def _known(self, bundle: str) -> str:
        if self._draining.is_set():
            raise CloudUnavailable(_DRAINING)
        if bundle not in self._backend.bundles:
            served = ", ".join(self._backend.bundles)
            raise UnknownBundle(f"bundle {bundle!r:.80} is not served here; served: {served}")
        if bundle in self._unserved():
            raise CloudUnavailable(f"no replica of {bundle!r} answers now; retry later")
        return bundle


@asynccontextmanager
async def _patient(patience_s: float) -> AsyncIterator[None]:
    """Raises DeadlineExceeded at the moment."""
    try:
        async with asyncio.timeout(patience_s):
            yield
    except TimeoutError:
        late = f"{patience_s * 1e3:.0f} ms passed before the answer was ready; give it more time"
        raise DeadlineExceeded(late) from None


async def _reply_or_abort(outcome: Outcome, context: Any) -> bytes:
    if outcome.code:
        pushback: tuple[tuple[str, str], ...] = ()
        if outcome.retry_after_ms:
            pushback = ((PUSHBACK, str(math.ceil(outcome.retry_after_ms))),)
        await context.abort(outcome.status, outcome.message[:MAX_MESSAGE], pushback)
    return outcome.payload


def _record(caller: Caller, context: Any) -> Served:
    """What is known of a request before it is looked at: whose it is, and the call's metadata."""
    metadata = dict(context.invocation_metadata() or ())
    traceparent = str(metadata.get("traceparent", ""))[:MAX_SHOWN]
    return Served(device=caller.device, peer=caller.peer, traceparent=traceparent)


def _remaining_s(context: Any) -> float:
    remaining = context.time_remaining()
    return math.inf if remaining is None else max(0.0, float(remaining))
