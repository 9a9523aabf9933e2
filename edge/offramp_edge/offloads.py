"""Samples in the air: how many at once, for how long each is waited for, and which are sent again.

A sample whose connection was lost is sent again while its deadline allows and the budget has something left,
after a wait with full jitter and once the cloud has been greeted again. Nothing else is: what was refused for
load would be a load again, and what had no answer in time has no time.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Callable

from offramp_common.clock import Clock
from offramp_common.retry import Backoff, RetryBudget
from offramp_common.transport import Completion
from offramp_edge.device import Progress
from offramp_edge.flight import Flight
from offramp_edge.not_answered import NotAnswered
from offramp_edge.session import CloudSession
from offramp_edge.settings import FINISH, EdgeSettings
from offramp_edge.usual import UsualTime

_TICK_S = 0.001  # an event loop's timers are no finer
_AGAIN = ("unavailable",)


class Offloads:
    """in_flight   samples sent, or waiting for room in the air
    usual       what an answer takes, waiting for room included
    """

    def __init__(
        self, session: CloudSession, settings: EdgeSettings, clock: Clock, rng: random.Random
    ) -> None:
        self.in_flight = 0
        self.usual = UsualTime()
        self.budget = RetryBudget(settings.retry_share)
        self._session, self._settings, self._clock, self._rng = session, settings, clock, rng
        self._backoff = Backoff(
            min(settings.retry_ms, settings.backoff_max_ms) / 1000, settings.backoff_max_ms / 1000
        )
        self._air = asyncio.Semaphore(settings.max_in_flight)

    async def room(self) -> None:
        """Wait until there is room in the air."""
        async with self._air:
            pass

    def full(self) -> bool:
        return self._air.locked()

    async def finish(
        self, flight: Flight, progress: Progress, until_s: float, on_trouble: Callable[[str], None]
    ) -> Completion:
        """Let the cloud run the rest of a sample. `on_trouble` is told the reason when it is to be sent
        again. Raises NotAnswered, at the latest when the clock shows `until_s`."""
        asked_s = self._clock.now()
        give_up_s = min(until_s, asked_s + self._settings.offload_timeout_ms / 1000)
        if give_up_s <= asked_s:
            raise NotAnswered("deadline")
        self.in_flight += 1
        self.budget.requested()
        try:
            done = await self._attempts(flight, progress, give_up_s, on_trouble)
        except (TimeoutError, NotAnswered) as error:
            reason = error.reason if isinstance(error, NotAnswered) else "timeout"
            late = self._clock.now() >= until_s - _TICK_S
            raise NotAnswered("deadline" if late else reason) from error
        except asyncio.CancelledError:
            self.usual.given_up(asked_s, self._clock.now())
            raise
        finally:
            self.in_flight -= 1
        self.usual.took(self._clock.now() - asked_s)
        return done

    async def _attempts(
        self,
        flight: Flight,
        progress: Progress,
        give_up_s: float,
        on_trouble: Callable[[str], None],
    ) -> Completion:
        for attempt in itertools.count():
            try:
                return await self._sent(flight, progress, give_up_s)
            except NotAnswered as error:
                flight.gave_up(error.reason, error.bytes_up)
                again = error.reason in _AGAIN and self._settings.fallback == FINISH
                if not (again and flight.sent is not None and self.budget.take()):
                    raise
                on_trouble(error.reason)
                try:
                    async with asyncio.timeout(give_up_s - self._clock.now()):
                        await asyncio.sleep(self._backoff.wait_s(attempt, self._rng))
                        await self._session.breaker.up.wait()
                except TimeoutError:
                    raise error from None
        raise AssertionError("unreachable")

    async def _sent(self, flight: Flight, progress: Progress, give_up_s: float) -> Completion:
        assert progress.rest is not None
        breaker, asked_s = self._session.breaker, self._clock.now()
        patience_s = None if give_up_s == math.inf else give_up_s - asked_s
        async with asyncio.timeout(patience_s):
            await self._air.acquire()
        try:
            if reason := breaker.refusal():  # since it was decided to send it
                raise NotAnswered(reason)
            breaker.at_work += 1
            try:
                traceparent, now_s = flight.sends(progress.rest.depth), self._clock.now()
                done = await self._session.finish(
                    progress.rest,
                    give_up_s - now_s,
                    traceparent,
                    progress.knobs,
                    progress.codec,
                )
            finally:
                breaker.at_work -= 1
        finally:
            self._air.release()
        flight.finished(done, 1000 * (now_s - asked_s))
        return done.completion
