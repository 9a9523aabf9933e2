"""What is left of a sample after its first stretch on the device: run in the cloud, here, or both.

The cloud's answer, and one that a sample leaves with here, are equal and end the race; the other side is
cancelled. At the deadline the deepest exit that was passed here answers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

from offramp_common.bundle import Bundle
from offramp_common.clock import Clock
from offramp_common.transport import Completion
from offramp_edge.answers import CLOUD, DEVICE, FALLBACK
from offramp_edge.device import AT_ONCE_S, Device, Passed, Progress
from offramp_edge.flight import Ending, Flight, Place
from offramp_edge.hedge import Hedge, HedgeCounts
from offramp_edge.not_answered import NotAnswered
from offramp_edge.offloads import Offloads
from offramp_edge.settings import EXIT, EdgeSettings

OnFirst = Callable[[Passed], None]


class Rest:
    """`hedges` counts layers run while the cloud had the sample too."""

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        offloads: Offloads | None,
        settings: EdgeSettings,
        clock: Clock,
    ) -> None:
        self.hedges = HedgeCounts()
        self._online, self._exits = bundle.manifest.online, bundle.manifest.exits
        self._device, self._offloads = device, offloads
        self._settings, self._clock = settings, clock

    async def away(self, flight: Flight, progress: Progress, on_first: OnFirst | None) -> Ending:
        """In the cloud, and here too where that is late. `on_first` gets the deepest exit passed, at once
        or, where none has been passed, as soon as one is."""
        hedge = Hedge(self._device, flight, progress, self.hedges)
        cloud = asyncio.create_task(self._in_cloud(flight, progress, hedge.trouble))
        self._arm(hedge, flight, progress, on_first)
        try:
            sides: tuple[asyncio.Future[Any], ...] = (cloud, hedge.left)
            await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
            if not cloud.done():
                return self._here(flight, hedge)
            try:
                done = cloud.result()
            except NotAnswered as why:
                if hedge.left.done():  # at the same moment
                    return self._here(flight, hedge)
                return await self._not_in_cloud(flight, hedge, why.reason)
            flight.hedge = CLOUD if hedge.ran else ""
            passed = Passed(
                int(done.exit_depth_B[0]),
                done.answers[0],
                float(done.confidence_B[0]),
                self._exit_classes(progress.passed, done),
            )
            return Ending(passed, (CLOUD, ""), True)
        finally:
            hedge.stop()
            cloud.cancel()
            await asyncio.gather(cloud, return_exceptions=True)

    async def alone(
        self, flight: Flight, progress: Progress, place: Place
    ) -> tuple[Progress, Place]:
        """Here, in the device's turn: to the end, or as far as place and time allow."""
        at_once = place[1] == "deadline" or (
            place[0] == FALLBACK and self._settings.fallback == EXIT
        )
        if not (at_once and progress.passed):
            asked_s = self._clock.now()
            until_s = AT_ONCE_S if at_once else flight.until_s
            progress = await self._device.go_on(progress, self._device.n_layers, until_s)
            flight.ran(progress, asked_s)
        if place[0] == DEVICE and progress.late:
            place = FALLBACK, "deadline"
        return progress, place

    def _arm(
        self, hedge: Hedge, flight: Flight, progress: Progress, on_first: OnFirst | None
    ) -> None:
        """Say when the hedge begins. An exit that answers at once is all that "exit" wants of it."""
        if on_first is not None and progress.passed is not None:
            on_first(progress.passed)
        elif on_first is not None and progress.rest is not None:
            hedge.first(self._first_exit(progress.rest.depth), on_first)
        if self._settings.hedge_after < math.inf and self._settings.fallback != EXIT:
            hedge.begin(self._hedge_after_s(flight, progress))

    def _hedge_after_s(self, flight: Flight, progress: Progress) -> float:
        """When the cloud is later than usual. Where that is not known, or not any more, as late as still
        leaves time for the rest here."""
        assert self._offloads is not None
        assert progress.rest is not None
        usual, factor, rest = self._offloads.usual, self._settings.hedge_after, progress.rest
        left_s = min(flight.until_s - self._clock.now(), self._settings.offload_timeout_ms / 1000)
        here_ms = self._device.times.ms(rest.depth, self._device.n_layers, rest.n_tokens)
        latest_s = (left_s - here_ms / 1000) if factor else 0.0
        if usual.late_s is None:
            return latest_s
        return factor * usual.late_s if usual.known else min(factor * usual.late_s, latest_s)

    def _here(self, flight: Flight, hedge: Hedge) -> Ending:
        """The sample left here before the cloud answered."""
        assert hedge.passed is not None
        hedge.used = True
        if hedge.reason:  # the cloud had failed it once, and was asked again in vain
            return Ending(hedge.passed, (FALLBACK, hedge.reason), True)
        flight.hedge = DEVICE
        return Ending(hedge.passed, (DEVICE, ""), True)

    async def _not_in_cloud(self, flight: Flight, hedge: Hedge, reason: str) -> Ending:
        hedge.used = True
        place: Place = FALLBACK, hedge.reason or reason
        if reason == "deadline" and hedge.passed is not None:
            flight.hedge = DEVICE if hedge.ran and not hedge.reason else ""
            return Ending(hedge.passed, place, False)
        progress = await hedge.halted()
        if progress.rest is not None:
            progress, place = await self._after_all(flight, progress, place)
        return Ending.of(progress, place)

    async def _after_all(
        self, flight: Flight, progress: Progress, place: Place
    ) -> tuple[Progress, Place]:
        """The cloud has failed this sample: wait for the device's turn while there is time."""
        turn, asked_s = self._device.turn, self._clock.now()
        patience_s = None if flight.until_s == math.inf else flight.until_s - asked_s
        if progress.passed is None:
            patience_s = None  # late is better than never
        elif self._settings.fallback == EXIT:
            return progress, place
        try:
            async with asyncio.timeout(patience_s):
                await turn.acquire()
        except TimeoutError:
            return progress, place
        try:
            return await self.alone(flight, progress, place)
        finally:
            turn.release()

    async def _in_cloud(
        self, flight: Flight, progress: Progress, on_trouble: Callable[[str], None]
    ) -> Completion:
        """Raises NotAnswered, at the latest when what is left is needed for an answer here."""
        assert self._offloads is not None
        assert progress.rest is not None
        rest, until_s = progress.rest, flight.until_s
        if progress.passed is None:
            first = self._first_exit(rest.depth)
            until_s -= self._device.times.ms(rest.depth, first, rest.n_tokens) / 1000
        return await self._offloads.finish(flight, progress, until_s, on_trouble)

    def _first_exit(self, depth: int) -> int:
        return next(exit_depth for exit_depth in self._exits if exit_depth > depth)

    def _exit_classes(self, before: Passed | None, done: Completion) -> tuple[int, ...]:
        """What the exits here and there predicted, up to the one that the sample left at."""
        if not self._online or done.exit_classes_BE is None:
            return ()
        here = () if before is None else before.exit_classes
        count = sum(depth <= done.exit_depth_B[0] for depth in self._exits)
        return (*here, *done.exit_classes_BE[0].tolist())[:count]
