"""Where samples come from, as async iterators in the worker's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from offramp_common.text import Text
from offramp_edge.answers import Failed, Sample

Given = Text | Sample | Failed
"""What `answer_many` takes: texts, samples, or a `Failed` that passes through in its place."""

_END: Any = object()


def samples(
    given: Iterable[Given] | AsyncIterable[Given], loop: asyncio.AbstractEventLoop | None
) -> AsyncGenerator[Sample | Failed, None]:
    """`given` as samples; an async iterable is read in `loop`, its own."""
    if isinstance(given, AsyncIterable):
        assert loop is not None, "an async iterable from outside an event loop"
        return _converted(_from_loop(given, loop))
    if isinstance(given, list | tuple):
        return _converted(_from_memory(given))
    return _converted(_from_thread(iter(given)))


async def _converted(given: AsyncGenerator[Given, None]) -> AsyncGenerator[Sample | Failed, None]:
    async with aclosing(given):
        async for item in given:
            yield item if isinstance(item, Sample | Failed) else Sample(item)


async def _from_memory(given: Iterable[Given]) -> AsyncGenerator[Given, None]:
    for item in given:
        yield item


async def _from_loop(
    given: AsyncIterable[Given], loop: asyncio.AbstractEventLoop
) -> AsyncGenerator[Given, None]:
    items = aiter(given)

    async def following() -> Any:
        return await anext(items, _END)

    while True:
        item = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(following(), loop))
        if item is _END:
            return
        yield item


async def _from_thread(items: Iterator[Given]) -> AsyncGenerator[Given, None]:
    """An iterator that may block (standard input) is read in a thread of its own, an item ahead of
    nobody: the next is asked for when there is room for it. The thread is a daemon: one that hangs
    in a read must not keep the program from ending."""
    loop = asyncio.get_running_loop()
    wanted: queue.SimpleQueue[asyncio.Future[Any] | None] = queue.SimpleQueue()

    def deliver(future: asyncio.Future[Any], item: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(item)

    def read() -> None:
        while (future := wanted.get()) is not None:
            item, error = _END, None
            try:
                item = next(items, _END)
            except BaseException as raised:  # noqa: BLE001 - raised again where it is awaited
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(deliver, future, item, error)

    threading.Thread(target=read, name="offramp-source", daemon=True).start()
    try:
        while True:
            future = loop.create_future()
            wanted.put(future)
            item = await future
            if item is _END:
                return
            yield item
    finally:
        wanted.put(None)
