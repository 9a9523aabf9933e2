"""The service of proto/offload.proto over a Backend.

Requests stay bytes: their few header fields are read here, the frame is passed on untouched.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from offramp_cloud.backends import Backend
from offramp_cloud.served import Observer, Served
from offramp_cloud.statuses import Outcome, UnknownBundle, failure, parsed
from offramp_common.errors import CloudBusy, CloudUnavailable, DeadlineExceeded
from offramp_common.wire import offload_pb2 as pb

SERVICE: str = pb.DESCRIPTOR.services_by_name["OffloadService"].full_name
_DRAINING = "the cloud is shutting down; connect again for another one"
_MAX_MESSAGE = 1000  # characters of a status message: it travels in a header
_MAX_SHOWN = 64  # characters of a stranger's id in the log


@dataclass(frozen=True, slots=True)
class Admission:
    """What the gateway lets in.

    in_flight_per_stream   requests of one stream at work; reading stops there
    max_bytes_in_flight    of all requests at work; beyond it they are refused as CloudBusy
    max_wait_s             the longest that any request is waited for, deadline or not
    """

    in_flight_per_stream: int = 32
    max_bytes_in_flight: int = 256 * 2**20
    max_wait_s: float = 60.0


class Servicer:
    """Raw handlers: bytes in, bytes out."""

    def __init__(
        self,
        backend: Backend,
        admission: Admission,
        observers: Sequence[Observer] = (),
        unserved: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """`unserved`: bundles without a replica at the moment; their requests are refused at once,
        where waiting would cost each device its deadline."""
        self._backend, self._admission, self._observers = backend, admission, observers
        self._unserved = unserved
        self._bytes = self.at_work = 0  # of requests being served
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Without (de)serializers, so that a malformed message gets a status of ours."""
        handlers = {
            "Hello": grpc.unary_unary_rpc_method_handler(self.hello),
            "Complete": grpc.unary_unary_rpc_method_handler(self.complete),
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

    async def hello(self, raw: bytes, context: Any) -> bytes:
        served = _caller(context)
        work = self._hello(raw, served, _remaining_s(context))
        return await _reply_or_abort(await self._served(served, work), context)

    async def complete(self, raw: bytes, context: Any) -> bytes:
        served = _caller(context)
        work = self._complete(raw, served, _remaining_s(context))
        return await _reply_or_abort(await self._served(served, work), context)

    async def complete_stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Reads while slots are free. A broken stream cancels this, and with it all its requests."""
        slots = asyncio.Semaphore(self._admission.in_flight_per_stream)
        writing = asyncio.Lock()  # one message at a time

        async def answer(raw: bytes) -> None:
            try:
                served = _caller(context)
                work = self._complete(raw, served, _remaining_s(context))
                message = _stream_reply(served, await self._served(served, work))
                async with writing:
                    await context.write(message)
            finally:
                slots.release()

        async def read() -> None:
            async for raw in requests:
                await slots.acquire()
                if self._draining.is_set():
                    return
                answers.create_task(answer(raw))

        # Not in the group: to cancel a read that waits breaks the writes of gRPC's Python as well.
        ends = (asyncio.create_task(read()), asyncio.create_task(self._draining.wait()))
        try:
            async with asyncio.TaskGroup() as answers:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if ends[0].done():
                    ends[0].result()
            if self._draining.is_set():
                await context.abort(grpc.StatusCode.UNAVAILABLE, _DRAINING)
        finally:
            for end in ends:
                end.cancel()

    async def _served(self, served: Served, work: Coroutine[Any, Any, Outcome]) -> Outcome:
        """`work`'s outcome, its errors as statuses; however it ends, the observers hear of it."""
        started_s = time.perf_counter()
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
            served.ms = (time.perf_counter() - started_s) * 1e3
            for observe in self._observers:
                observe(served)

    async def _hello(self, raw: bytes, served: Served, patience_s: float) -> Outcome:
        served.nbytes = len(raw)
        served.bundle = self._known(parsed(pb.HelloRequest, raw).bundle)
        async with _patient(min(patience_s, self._admission.max_wait_s)):
            return await self._backend.hello(served.bundle, raw)

    async def _complete(self, raw: bytes, served: Served, patience_s: float) -> Outcome:
        served.nbytes = len(raw)
        header = parsed(pb.OffloadRequest, raw)
        served.request_id = header.request_id[:_MAX_SHOWN]
        served.traceparent = header.traceparent[:_MAX_SHOWN] or served.traceparent
        served.bundle = self._known(header.bundle)
        deadline_s = header.deadline_ms / 1e3 if header.deadline_ms > 0 else math.inf
        del header  # and its copy of the frame
        patience_s = min(patience_s, deadline_s, self._admission.max_wait_s)
        with self._room_for(len(raw)):
            async with _patient(patience_s):
                outcome = await self._backend.complete(served.bundle, raw, patience_s * 1e3)
        if not outcome.code:
            reply = pb.OffloadReply.FromString(outcome.payload)
            served.exit_depths, served.rows = tuple(reply.exit_depths), len(reply.exit_depths)
            served.queue_ms, served.compute_ms = reply.queue_ms, reply.compute_ms
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

    @contextmanager
    def _room_for(self, nbytes: int) -> Iterator[None]:
        most = self._admission.max_bytes_in_flight
        if self._bytes and self._bytes + nbytes > most:
            raise CloudBusy(f"{self._bytes} bytes of requests at work, at most {most}; retry later")
        self._bytes += nbytes
        try:
            yield
        finally:
            self._bytes -= nbytes


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
        await context.abort(outcome.status, outcome.message[:_MAX_MESSAGE])
    return outcome.payload


def _stream_reply(served: Served, outcome: Outcome) -> bytes:
    if outcome.code:
        error = pb.RequestError(
            request_id=served.request_id,
            code=outcome.code,
            message=outcome.message[:_MAX_MESSAGE],
        )
        return pb.StreamReply(error=error).SerializeToString()
    reply = pb.OffloadReply.FromString(outcome.payload)
    return pb.StreamReply(reply=reply).SerializeToString()


def _caller(context: Any) -> Served:
    """What the connection and the call's metadata say of the caller."""
    names = context.auth_context().get("x509_common_name", ())
    device = b" ".join(names).decode(errors="replace")[:_MAX_SHOWN]
    metadata = dict(context.invocation_metadata() or ())
    traceparent = str(metadata.get("traceparent", ""))[:_MAX_SHOWN]
    return Served(device=device, peer=context.peer(), traceparent=traceparent)


def _remaining_s(context: Any) -> float:
    remaining = context.time_remaining()
    return math.inf if remaining is None else max(0.0, float(remaining))
