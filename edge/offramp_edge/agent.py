"""One sample's way through the device: layers here, the rest in the cloud, or here after all.

All of this file runs in one event loop; layers run in the device's thread, so that while one
sample's frame is in the air the next is computed. `EdgeWorker` (worker.py) is its front.

The deadline is a contract: a sample is answered by it, from the cloud or from the deepest exit it
has passed. Where the cut lies before the first exit, the time to reach that exit is kept free.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
from collections.abc import Callable
from dataclasses import replace

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.clock import Clock
from offramp_common.errors import ConfigError, RequestError
from offramp_common.runner import Knobs
from offramp_common.text import label_of
from offramp_common.tracing import OFF, Tracer
from offramp_edge.answers import DEVICE, FALLBACK, Answer, Sample
from offramp_edge.breaker import ASIDE
from offramp_edge.device import Choose, Device, Passed, Progress
from offramp_edge.flight import Ending, Flight, Place
from offramp_edge.hedge import HedgeCounts
from offramp_edge.offloads import Offloads
from offramp_edge.planning import Choice, Planner, Standing
from offramp_edge.resend import Resender
from offramp_edge.rest import Rest
from offramp_edge.session import CloudSession
from offramp_edge.settings import EdgeSettings
from offramp_edge.trace import Trace
from offramp_edge.turn import LAST

log = logging.getLogger("offramp.edge")

_WARM_UP = "which of these words will the first layers see before anyone asks them anything"


class Agent:
    """Answers samples; never loses one."""

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        session: CloudSession | None,
        planner: Planner,
        settings: EdgeSettings,
        clock: Clock,
        choose: Callable[[], Knobs] | None = None,
        rng: random.Random | None = None,
        resender: Resender | None = None,
    ) -> None:
        """Without a `session` all layers run here, whatever `planner` says. `choose` gives the next
        sample's own knobs, where the method chooses a sample's exit before it runs;
        `resender` keeps what is answered short of the whole model until the cloud is back."""
        self.session, self.planner = session, planner
        self.on_answer: list[Callable[[Answer], None]] = []
        self.tracer: Tracer = OFF  # whoever wants spans brings another
        self._task = bundle.manifest.task
        self._device, self._settings, self._clock = device, settings, clock
        self._choose = choose
        self.offloads = None
        if session is not None:
            self.offloads = Offloads(session, settings, clock, rng or random.Random())
        self.resender = resender
        self._rest = Rest(bundle, device, self.offloads, settings, clock)
        self._numbers = itertools.count(1)
        self._background: list[asyncio.Task[None]] = []

    @property
    def hedges(self) -> HedgeCounts:
        return self._rest.hedges

    async def start(self) -> None:
        """Begin to look for the cloud, and meanwhile load and time the layers. Raises BundleError
        for layers that cannot be loaded."""
        if self.session is not None:
            self._background.append(asyncio.create_task(self.session.keep()))
        if self.resender is not None:
            self._background.append(asyncio.create_task(self.resender.run(self)))
        await self._device.warm_up((_WARM_UP, _WARM_UP) if self._task.pair else _WARM_UP)

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self.resender is not None:
            await self.resender.close()
        if self.session is not None:
            await self.session.close()

    async def room(self) -> None:
        """Wait until an offload would not have to wait for room in the air."""
        if self.offloads is not None:
            await self.offloads.room()

    async def answer(
        self,
        sample: Sample,
        on_provisional: Callable[[Answer], None] | None = None,
        off_device: asyncio.Event | None = None,
    ) -> Answer:
        """`on_provisional` gets the deepest exit's answer when the sample is sent to the cloud (the first
        exit's, as soon as that is reached, where none was passed); `off_device` is set when the device
        has room for the next. RequestError for a bad text."""
        flight = self._take(sample, off_device or asyncio.Event())
        on_first = None
        if on_provisional is not None:
            tell = on_provisional

            def on_first(passed: Passed) -> None:
                tell(self._answer(flight, Ending(passed, (DEVICE, "provisional"), False)))

        ending = await self._ending(flight, on_first)
        if self.resender is not None and not ending.complete:
            flight.spooled = await self.resender.keep(flight.sample)
        return self._told(self._final(flight, ending))

    async def answer_again(self, sample: Sample) -> Answer:
        """The same for one that waits in the spool: behind all others, without a deadline, not counted."""
        flight = self._take(replace(sample, deadline_ms=math.inf), asyncio.Event())
        flight.rank = LAST
        return self._final(flight, await self._ending(flight, None))

    async def _ending(self, flight: Flight, on_first: Callable[[Passed], None] | None) -> Ending:
        try:
            progress, place = await self._on_device(flight)
        finally:
            flight.off_device.set()
        if place is not None:
            return Ending.of(progress, place)
        return await self._rest.away(flight, progress, on_first)

    def _take(self, sample: Sample, off_device: asyncio.Event) -> Flight:
        now_s, number = self._clock.now(), next(self._numbers)
        ms = self._settings.deadline_ms if sample.deadline_ms is None else sample.deadline_ms
        until_s = math.inf if ms is None else now_s + (ms - self._settings.margin_ms) / 1000
        if not sample.id:
            sample = replace(sample, id=str(number))
        flight = Flight(sample, number, now_s, until_s, off_device)
        if self.tracer.on:
            flight.trace = Trace(self.tracer, sample.traceparent, now_s)
        return flight

    async def _on_device(self, flight: Flight) -> tuple[Progress, Place | None]:
        """The device's layers; without a place where the cloud is to run the rest."""
        asked_s = self._clock.now()
        flight.waited = await self._device.turn.acquire(flight.rank)
        try:
            progress = await self._begin(flight)
            flight.ran(progress, asked_s)
            self._missed()
            if progress.rest is None:
                return progress, (DEVICE, "")
            if progress.late:
                return progress, (FALLBACK, "deadline")
            place = self._place()
            if place is None:
                return progress, None
            return await self._rest.alone(flight, progress, place)
        finally:
            self._device.turn.release()

    async def _begin(self, flight: Flight) -> Progress:
        text = flight.sample.text
        pair = isinstance(text, tuple) and len(text) == 2
        parts = text if pair else (text,)
        if not all(isinstance(part, str) for part in parts):
            raise RequestError(f"input {text!r:.80}: must be a text, or a pair of texts")
        try:
            knobs = None if self._choose is None else self._choose()
            return await self._device.begin(text, self._way(flight), flight.until_s, knobs)
        except ConfigError as error:
            raise RequestError(str(error)) from None

    def _way(self, flight: Flight) -> Choose:
        """The planner's word for one sample, asked in the device's thread: what it is told of the
        event loop's side are single numbers, which may be a moment old."""
        if self.session is None or self.offloads is None:
            stay = Choice(self._device.n_layers)
            return lambda rest, passed, now_s: stay
        session, offloads, turn = self.session, self.offloads, self._device.turn

        def choose(rest: Activations[NumpyArray], passed: Passed | None, now_s: float) -> Choice:
            standing = Standing(
                rest.depth,
                rest.n_tokens,
                None if passed is None else passed.confidence,
                1000 * (flight.until_s - now_s),
                turn.samples,
                offloads.in_flight,
                session.worth_asking(),
                flight.waited,
            )
            return self.planner.choose(standing)

        return choose

    def _missed(self) -> None:
        """Tell the breaker that a sample would have been welcome to the cloud."""
        if self.session is not None and self.session.breaker.state == ASIDE:
            self.session.breaker.missed.set()

    def _place(self) -> Place | None:
        """Why the rest stays here; None where the cloud is to run it."""
        if self.session is None:
            return DEVICE, ""
        if reason := self.session.breaker.refusal():
            return FALLBACK, reason
        return None if self.session.link_is_good() else (DEVICE, "")

    def _answer(self, flight: Flight, ending: Ending) -> Answer:
        passed, place = ending.passed, ending.place
        said = label_of(self._task, passed.answer)
        return Answer(
            id=flight.sample.id,
            text=flight.sample.text,
            label=said.label,
            probability=said.probability,
            exit_depth=passed.depth,
            where=place[0],
            reason=place[1],
            split=self._device.n_layers if flight.sent is None else flight.sent,
            complete=ending.complete,
            confidence=passed.confidence,
            ms=1000 * (self._clock.now() - flight.began_s),
            stages_ms=flight.stages,
            bytes_up=flight.bytes_up,
            bytes_down=flight.bytes_down,
            logits=tuple(passed.answer.tolist()) if self._settings.logits else None,
            exit_classes=passed.exit_classes,
            hedge=flight.hedge,
            spooled=flight.spooled,
            codec=flight.codec,
        )

    def _final(self, flight: Flight, ending: Ending) -> Answer:
        answer = self._answer(flight, ending)
        if flight.trace is not None:
            flight.trace.end(answer)
        return answer

    def _told(self, answer: Answer) -> Answer:
        for tell in self.on_answer:
            tell(answer)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("answered %s", answer.to_json())
        return answer
