"""Handshakes that overlap."""

from __future__ import annotations

import asyncio
import gc
from typing import Any, cast

import pytest

from offramp_common.clock import MonotonicClock
from offramp_common.errors import CloudUnavailable
from offramp_common.transport import Hello, Transport, Welcome
from offramp_edge.greetings import Greetings

HELLO = Hello("bundle", {0: b"digest"}, ("fp32",))


class Answering:
    """A transport that answers greetings when it is told to, in the order they were made."""

    def __init__(self) -> None:
        self.asked: list[asyncio.Future[Welcome]] = []

    async def hello(self, hello: Hello, timeout_s: float) -> Welcome:
        self.asked.append(asyncio.get_running_loop().create_future())
        return await self.asked[-1]


async def two_under_way() -> tuple[Answering, asyncio.Task[Any]]:
    transport = Answering()
    greetings = Greetings(cast(Transport, transport), MonotonicClock(), longest_s=5)
    with pytest.raises(TimeoutError, match="no answer to the handshake within"):
        await greetings.greet(HELLO, patience_s=0.01)
    second = asyncio.create_task(greetings.greet(HELLO, patience_s=5))
    await asyncio.sleep(0.01)
    return transport, second


async def test_the_first_greeting_may_be_answered_during_the_second() -> None:
    transport, second = await two_under_way()
    welcome = cast(Welcome, object())
    transport.asked[0].set_result(welcome)
    assert (await second)[0] is welcome


async def test_an_answer_counts_at_once_however_long_the_others_take_to_leave() -> None:
    left = asyncio.Event()

    class Lingering(Answering):
        async def hello(self, hello: Hello, timeout_s: float) -> Welcome:
            try:
                return await super().hello(hello, timeout_s)
            except asyncio.CancelledError:
                await asyncio.sleep(0.2)  # as closing a connection does
                left.set()
                raise

    transport = Lingering()
    greetings = Greetings(cast(Transport, transport), MonotonicClock(), longest_s=5)
    with pytest.raises(TimeoutError):
        await greetings.greet(HELLO, patience_s=0.01)
    second = asyncio.create_task(greetings.greet(HELLO, patience_s=0.1))
    await asyncio.sleep(0.01)
    welcome = cast(Welcome, object())
    transport.asked[0].set_result(welcome)
    assert (await second)[0] is welcome
    assert not left.is_set()
    await greetings.close()
    assert left.is_set()


async def test_one_that_fails_as_another_is_answered_is_not_left_for_asyncio_to_print() -> None:
    printed: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: printed.append(context))
    for failing in (0, 1):  # in whichever order a set of two comes
        transport, second = await two_under_way()
        transport.asked[failing].set_exception(CloudUnavailable("gone"))
        transport.asked[1 - failing].set_result(cast(Welcome, object()))
        await second
        del transport, second
        gc.collect()
        await asyncio.sleep(0)
    assert printed == []


async def test_where_all_fail_the_last_failure_is_raised() -> None:
    transport, second = await two_under_way()
    for asked in transport.asked:
        asked.set_exception(CloudUnavailable("gone"))
    with pytest.raises(CloudUnavailable, match="gone"):
        await second
