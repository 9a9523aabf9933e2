"""Handshakes that do not wait for one another.

On a link that has swallowed one, the next must not wait until that has certainly failed: it would be so much
longer until a link that is back is found out. So each is given up only after the longest wait, but soon
another one follows; whichever is answered first counts.
"""

from __future__ import annotations

import asyncio

from offramp_common.clock import Clock
from offramp_common.transport import Hello, Transport, Welcome

Greeted = tuple[Welcome, float]
"""The cloud's answer, and the milliseconds it took."""

DOUBTS_APART_S = 1.0
"""Doubts are settled by a handshake at most this often."""
_SOONEST_DOUBT_S = 0.25
_UNUSUAL = 4.0  # times the usual time of an answer
_NEW = 0.2  # weight of the latest answer in the usual time
_SOON_MS = 500.0
_ROUND_TRIPS = 5  # connecting takes up to three with TLS, the handshake one


def doubt_s(usual_s: float) -> float:
    """After so long without an answer, of which the usual time is this, the cloud is greeted."""
    return max(_SOONEST_DOUBT_S, _UNUSUAL * usual_s)


def usual_after(usual_s: float | None, took_s: float) -> float:
    """The usual time of an answer, a moving average, once another one has taken so long."""
    before_s = took_s if usual_s is None else usual_s
    return before_s + _NEW * (took_s - before_s)


def patience_ms(longest_ms: float, rtt_ms: float) -> float:
    """With a greeting: a few round trips, within limits; rtt_ms 0 is the least."""
    return min(longest_ms, max(_SOON_MS, _ROUND_TRIPS * rtt_ms))


class Greetings:
    def __init__(self, transport: Transport, clock: Clock, longest_s: float) -> None:
        self._transport, self._clock, self._longest_s = transport, clock, longest_s
        self._pending: set[asyncio.Task[Greeted]] = set()
        self._leaving: set[asyncio.Task[Greeted]] = set()  # nobody waits for these any more

    async def greet(self, hello: Hello, patience_s: float) -> Greeted:
        """Send another one, and wait for it and for those before it. Raises what the last to fail raised, or
        TimeoutError; then some of them may still be answered during the next call."""
        self._pending.add(asyncio.create_task(self._hello(hello)))
        failure: BaseException | None = None
        try:
            async with asyncio.timeout(patience_s):
                while self._pending:
                    done, self._pending = await asyncio.wait(
                        self._pending, return_when=asyncio.FIRST_COMPLETED
                    )
                    # Asks each: asyncio prints an exception that nobody asked for.
                    answered = [task for task in done if task.exception() is None]
                    if answered:
                        # To close their connections takes longer than patience may last.
                        self._give_up()
                        return answered[0].result()
                    failure = next(iter(done)).exception()
        except TimeoutError:
            raise TimeoutError(f"no answer to the handshake within {patience_s:.1f} s") from None
        assert failure is not None
        raise failure

    async def close(self) -> None:
        self._give_up()
        await asyncio.gather(*self._leaving, return_exceptions=True)

    def _give_up(self) -> None:
        pending, self._pending = self._pending, set()
        for task in pending:
            task.cancel()
            self._leaving.add(task)
            task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[Greeted]) -> None:
        self._leaving.discard(task)
        if not task.cancelled():
            task.exception()  # asked, or asyncio prints it

    async def _hello(self, hello: Hello) -> Greeted:
        began_s = self._clock.now()
        # The transport's own limit first: it draws conclusions from it.
        async with asyncio.timeout(1.1 * self._longest_s):
            welcome = await self._transport.hello(hello, timeout_s=self._longest_s)
        return welcome, 1000 * (self._clock.now() - began_s)
