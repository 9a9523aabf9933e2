"""One CompleteStream call: many requests of a device, answered as they are ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from typing import Any

from google.protobuf.message import DecodeError

from offramp_cloud.served import Served
from offramp_cloud.stalls import IDLE, REPLY
from offramp_cloud.statuses import Outcome
from offramp_common.wire import offload_pb2 as pb

MAX_MESSAGE = 1000  # characters of a status message: it travels in a header
MAX_SHOWN = 64  # characters of a stranger's id in the log
_LONGEST_CANCEL = 128  # bytes of a message that cancels a request: its id and a flag

Begin = Callable[[bytes], tuple[Served, Coroutine[Any, Any, Outcome]]]
"""A request's bytes -> its record, and the work that fills it in."""


class _Untaken(Exception):
    """A reply has not been taken for too long."""


class DeviceStream:
    """run() once. Reads while slots are free; a slot is taken until its reply has been written, so who
    reads no replies is read no further requests. A stream that nothing is asked on for `idle_timeout_s`
    has come to its end."""

    def __init__(
        self,
        write: Callable[[bytes], Awaitable[None]],
        begin: Begin,
        draining: asyncio.Event,
        in_flight: int,
        reply_timeout_s: float,
        idle_timeout_s: float,
    ) -> None:
        self._write, self._begin, self._draining = write, begin, draining
        self._reply_timeout_s, self._idle_timeout_s = reply_timeout_s, idle_timeout_s
        self._ended = ""  # why it is read no further, although the device would go on
        self._touch()
        self._slots = asyncio.Semaphore(in_flight)
        self._writing = asyncio.Lock()  # one message at a time
        self._jobs: dict[asyncio.Task[Outcome], Served] = {}

    async def run(self, requests: AsyncIterator[bytes]) -> str:
        """Until the device has ended the stream and has its answers, or the cloud drains. Cancelled
        when the stream breaks, and with it all its requests. Returns IDLE where nothing has been asked
        for too long; REPLY, with requests given up and a write that is stuck, where a reply has not
        been taken in time."""
        answers = asyncio.TaskGroup()
        # Not in the group: to cancel a read that waits breaks the writes of gRPC's Python as well.
        reading = asyncio.create_task(self._read(requests, answers))
        ends = (reading, asyncio.create_task(self._draining.wait()))
        try:
            async with answers:
                await self._until_over(ends)
                if reading.done():
                    reading.result()
        except* _Untaken:
            pass
        finally:
            for end in ends:
                end.cancel()
        return self._ended

    async def _until_over(self, ends: Collection[asyncio.Task[Any]]) -> None:
        """Wait for one of them, or until nothing has been asked for too long."""
        clock = asyncio.get_running_loop().time
        while not self._ended:
            left_s = self._idle_timeout_s
            if not self._jobs:
                left_s += self._busy_s - clock()
            done, _ = await asyncio.wait(ends, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return
            if not self._jobs and clock() >= self._busy_s + self._idle_timeout_s:
                self._ended = IDLE

    async def _read(self, requests: AsyncIterator[bytes], answers: asyncio.TaskGroup) -> None:
        async for raw in requests:
            self._touch()
            if unwanted := _cancelled(raw):
                for job, served in self._jobs.items():
                    if served.request_id == unwanted:
                        job.cancel()
                continue
            await self._slots.acquire()
            if self._draining.is_set() or self._ended:
                return
            answers.create_task(self._answer(raw))

    async def _answer(self, raw: bytes) -> None:
        served, work = self._begin(raw)
        job = asyncio.create_task(work)
        self._jobs[job] = served
        try:
            await asyncio.wait({job})
            if job.cancelled():
                return  # its device does not want it any more
            message = _reply(served, job.result())
            await self._writing.acquire()
            await self._written(message)
            self._writing.release()  # not where that fails: nothing can be written any more
        finally:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)
            del self._jobs[job]
            self._touch()
            self._slots.release()

    def _touch(self) -> None:
        """A message has come, or has been answered."""
        self._busy_s = asyncio.get_running_loop().time()

    async def _written(self, message: bytes) -> None:
        try:
            async with asyncio.timeout(self._reply_timeout_s):
                await self._write(message)
        except TimeoutError:
            self._ended = REPLY
            raise _Untaken from None


def _cancelled(raw: bytes) -> str:
    """The id of the request that this message cancels; empty where it is none that does."""
    if len(raw) > _LONGEST_CANCEL:  # not parsed twice
        return ""
    try:
        request = pb.OffloadRequest.FromString(raw)
    except DecodeError:
        return ""  # answered like any malformed request
    return request.request_id[:MAX_SHOWN] if request.cancel else ""


def _reply(served: Served, outcome: Outcome) -> bytes:
    if outcome.code:
        error = pb.RequestError(
            request_id=served.request_id,
            code=outcome.code,
            message=outcome.message[:MAX_MESSAGE],
            retry_after_ms=outcome.retry_after_ms,
        )
        return pb.StreamReply(error=error).SerializeToString()
    reply = pb.OffloadReply.FromString(outcome.payload)
    return pb.StreamReply(reply=reply).SerializeToString()
