"""Sends what was spooled once the cloud is back: behind everything else, one sample at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sqlite3
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol, TypeVar

from offramp_common.errors import RequestError
from offramp_common.retry import Backoff
from offramp_edge.answers import Answer, Failed, Sample
from offramp_edge.breaker import Breaker
from offramp_edge.spool import Kept, Spool

R = TypeVar("R")
log = logging.getLogger("offramp.edge")


class AnswersAgain(Protocol):
    async def answer_again(self, sample: Sample) -> Answer: ...


class Resender:
    """Owns the spool, and the thread that waits for its disk."""

    def __init__(
        self,
        spool: Spool,
        breaker: Breaker,
        rng: random.Random,
        on_final: Callable[[Answer], None] | None = None,
        thread: Executor | None = None,
    ) -> None:
        """`on_final` gets every final answer once it is on disk. `thread` waits for the disk: one of its
        own, unless given."""
        self.spool, self.lost = spool, 0
        self._empty = asyncio.Event()
        self._some = asyncio.Event()
        self._breaker, self._rng, self._on_final = breaker, rng, on_final
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="offramp-spool")
        self._note()

    async def keep(self, sample: Sample) -> bool:
        """Whether it is durable now. A disk that is full costs the final answer, never the first."""
        try:
            await self._in_thread(lambda: self.spool.keep(sample))
        except (sqlite3.Error, OSError) as error:
            self.lost += 1
            if self.lost == 1:
                log.error("the spool takes no samples (%s): they get no final answer", error)
            return False
        self._note()
        return True

    async def run(self, agent: AnswersAgain) -> None:
        """Until cancelled."""
        backoff, failures = Backoff(), 0
        while True:
            await self._some.wait()
            await self._breaker.up.wait()
            try:
                gone = await self._one(agent)
            except (sqlite3.Error, OSError) as error:
                log.error("the spool's disk fails (%s)", error)
                gone = False
            failures = 0 if gone else failures + 1
            if failures:
                await asyncio.sleep(backoff.wait_s(failures - 1, self._rng))

    async def emptied(self, timeout_s: float) -> bool:
        """Wait until nothing waits any more; False when that takes longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        return self._empty.is_set()

    async def close(self) -> None:
        await self._in_thread(self.spool.close)
        self._thread.shutdown()

    async def _one(self, agent: AnswersAgain) -> bool:
        """Whether the oldest sample is done with."""
        kept = await self._in_thread(self.spool.oldest)
        if kept is None:
            self._note()
            return True
        result: Answer | Failed
        try:
            result = await agent.answer_again(kept.sample)
        except RequestError as error:  # it was a sample once: the bundle is another one now
            result = Failed(kept.sample.id, str(error))
        if isinstance(result, Answer) and not result.complete:
            return False
        await self._write(kept, result)
        return True

    async def _write(self, kept: Kept, result: Answer | Failed) -> None:
        writing = asyncio.ensure_future(
            self._in_thread(lambda: self.spool.answered(kept, result.to_json()))
        )
        try:
            written = await asyncio.shield(writing)
        except asyncio.CancelledError:  # the line and the callback belong together
            self._told(await writing, result)
            raise
        self._told(written, result)

    def _told(self, written: bool, result: Answer | Failed) -> None:
        self._note()
        if written and self._on_final is not None and isinstance(result, Answer):
            try:
                self._on_final(result)
            except Exception:
                log.exception("on_final raised")

    def _note(self) -> None:
        """Events follow what the spool holds."""
        for event, holds in (
            (self._some, self.spool.waiting > 0),
            (self._empty, not self.spool.waiting),
        ):
            event.set() if holds else event.clear()

    async def _in_thread(self, call: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
