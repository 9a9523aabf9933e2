"""Many samples through one agent: in order or as they come, with back-pressure at both ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from offramp_common.errors import RequestError
from offramp_edge.agent import Agent
from offramp_edge.answers import Answer, Failed, Sample

Result = Answer | Failed

log = logging.getLogger("offramp.edge")
_WAITING = 64
"""Samples begun and not handed on: answered ones wait here for an earlier one, or for a reader."""


class Stream:
    """One run of `answer_many`. `close` may be called at any time, also while a result is awaited."""

    def __init__(
        self,
        agent: Agent,
        source: AsyncGenerator[Sample | Failed, None],
        ordered: bool,
        in_flight: int,
        provisional: bool = False,
    ) -> None:
        """A `Failed` in `source` passes through in its place. With `provisional` also the first answers of
        samples that are sent come, and all as they are ready: in order they would be no first answers."""
        self._agent, self._source, self._ordered = agent, source, ordered and not provisional
        self._on_provisional = self._first if provisional else None
        self._out: asyncio.Queue[asyncio.Future[Result] | None] = asyncio.Queue()
        self._window = asyncio.Semaphore(_WAITING + in_flight)
        self._begun: set[asyncio.Future[Result]] = set()
        self._feeding: asyncio.Task[None] | None = None

    async def following(self) -> Result | None:
        """The next result; None after the last. What the source raised comes after them all."""
        if self._feeding is None:
            self._feeding = asyncio.create_task(self._feed())
        coming = await self._out.get()
        if coming is None:
            self._out.put_nowait(None)  # whoever asks again
            await self._feeding
            return None
        result = await coming
        if isinstance(result, Failed) or not result.provisional:
            self._window.release()
        return result

    async def close(self) -> None:
        """Give up what has begun."""
        tasks: list[asyncio.Future[Any]] = [*self._begun]
        if self._feeding is not None:
            tasks.append(self._feeding)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(self) -> None:
        """A sample is taken when the device is free and the air has room: none waits here with its
        clock running, and a slow link slows the reading of the source."""
        try:
            async with aclosing(self._source) as source:
                async for sample in source:
                    await self._window.acquire()
                    await self._agent.room()
                    off_device = asyncio.Event()
                    self._begin(sample, off_device)
                    await off_device.wait()
        finally:
            if self._begun:
                await asyncio.wait(set(self._begun))
            self._out.put_nowait(None)

    def _begin(self, sample: Sample | Failed, off_device: asyncio.Event) -> None:
        task = asyncio.ensure_future(self._result(sample, off_device))
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        if self._ordered:
            self._out.put_nowait(task)
        else:
            task.add_done_callback(self._out.put_nowait)

    def _first(self, answer: Answer) -> None:
        coming: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        coming.set_result(answer)
        self._out.put_nowait(coming)

    async def _result(self, sample: Sample | Failed, off_device: asyncio.Event) -> Result:
        if isinstance(sample, Failed):
            off_device.set()
            return sample
        try:
            return await self._agent.answer(sample, self._on_provisional, off_device)
        except RequestError as error:
            return Failed(sample.id, str(error))
        except Exception as error:  # one sample's failure is not the others'
            log.error("a bug, please report it", exc_info=error)
            return Failed(sample.id, f"internal error: {type(error).__name__}: {error}")
