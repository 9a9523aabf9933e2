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
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from offramp_common.bundle import Bundle
from offramp_common.clock import Clock
from offramp_common.errors import ConfigError, RequestError
from offramp_common.runner import Knobs
from offramp_common.text import label_of
from offramp_common.transport import Completion
from offramp_edge.answers import CLOUD, DEVICE, FALLBACK, Answer, Sample, Stages
from offramp_edge.device import AT_ONCE_S, Device, Passed, Progress
from offramp_edge.session import CloudSession, Finished, NotAnswered
from offramp_edge.settings import EXIT, EdgeSettings

log = logging.getLogger("offramp.edge")

Place = tuple[str, str]
"""Where a sample is answered, and the reason if that is a fallback."""

_WARM_UP = "which of these words will the first layers see before anyone asks them anything"

_TICK_S = 0.001  # an event loop's timers are no finer


@dataclass(slots=True)
class _Flight:
    """A sample on its way, and what it has cost. `until_s`: the clock by which it is answered."""

    sample: Sample
    began_s: float
    until_s: float
    off_device: asyncio.Event
    stages: Stages = field(default_factory=Stages)
    bytes_up: int = 0
    bytes_down: int = 0


class Agent:
    """Answers samples; never loses one."""

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        session: CloudSession | None,
        split: int,
        settings: EdgeSettings,
        clock: Clock,
        choose: Callable[[], Knobs] | None = None,
    ) -> None:
        """Without a `session` all layers run here, whatever `split` says. `choose` gives the next
        sample's own knobs, where the method chooses a sample's exit before it runs."""
        self.session = session
        self.split = device.n_layers if session is None else split
        self.on_answer: list[Callable[[Answer], None]] = []
        self._task, self._exits = bundle.manifest.task, bundle.manifest.exits
        self._device, self._settings, self._clock = device, settings, clock
        self._choose = choose
        self.air = asyncio.Semaphore(settings.max_in_flight)
        self._numbers = itertools.count(1)
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to look for the cloud, and meanwhile load and time the layers. Raises BundleError
        for layers that cannot be loaded."""
        if self.session is not None:
            self._background.append(asyncio.create_task(self.session.keep()))
        await self._device.warm_up((_WARM_UP, _WARM_UP) if self._task.pair else _WARM_UP)

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self.session is not None:
            await self.session.close()

    async def answer(
        self,
        sample: Sample,
        on_provisional: Callable[[Answer], None] | None = None,
        off_device: asyncio.Event | None = None,
    ) -> Answer:
        """`on_provisional` gets the deepest exit's answer when the sample is sent to the cloud;
        `off_device` is set when the device has room for the next. RequestError for a bad text."""
        flight = self._take(sample, off_device or asyncio.Event())
        try:
            progress, place = await self._on_device(flight)
        finally:
            flight.off_device.set()
        if place is None and progress.rest is not None:
            if on_provisional is not None and progress.passed is not None:
                on_provisional(self._answer(flight, progress.passed, (DEVICE, "provisional")))
            try:
                return self._told(await self._in_cloud(flight, progress))
            except NotAnswered as why:
                progress, place = await self._after_all(flight, progress, why.reason)
        assert progress.passed is not None, "a sample without an answer"
        return self._told(self._answer(flight, progress.passed, place or (DEVICE, "")))

    def _take(self, sample: Sample, off_device: asyncio.Event) -> _Flight:
        now_s = self._clock.now()
        ms = self._settings.deadline_ms if sample.deadline_ms is None else sample.deadline_ms
        until_s = math.inf if ms is None else now_s + (ms - self._settings.margin_ms) / 1000
        if not sample.id:
            sample = replace(sample, id=str(next(self._numbers)))
        return _Flight(sample, now_s, until_s, off_device)

    async def _on_device(self, flight: _Flight) -> tuple[Progress, Place | None]:
        """The device's layers; without a place where the cloud is to run the rest."""
        asked_s = self._clock.now()
        async with self._device.turn:
            progress = await self._begin(flight)
            _count(flight, progress, asked_s)
            if progress.rest is None:
                return progress, (DEVICE, "")
            if progress.late:
                return progress, (FALLBACK, "deadline")
            place = self._place()
            if place is None:
                return progress, None
            return await self._alone(flight, progress, place)

    async def _begin(self, flight: _Flight) -> Progress:
        text = flight.sample.text
        pair = isinstance(text, tuple) and len(text) == 2
        parts = text if pair else (text,)
        if not all(isinstance(part, str) for part in parts):
            raise RequestError(f"input {text!r:.80}: must be a text, or a pair of texts")
        try:
            knobs = None if self._choose is None else self._choose()
            return await self._device.begin(text, self.split, flight.until_s, knobs)
        except ConfigError as error:
            raise RequestError(str(error)) from None

    def _place(self) -> Place | None:
        """Why the rest stays here; None where the cloud is to run it."""
        if self.session is None:
            return DEVICE, ""
        if not self.session.worth_asking():
            return FALLBACK, self.session.breaker.reason
        return None if self.session.link_is_good() else (DEVICE, "")

    async def _alone(
        self, flight: _Flight, progress: Progress, place: Place
    ) -> tuple[Progress, Place]:
        """Run the rest here, in the device's turn: to the end, or as far as place and time allow."""
        at_once = place[1] == "deadline" or (
            place[0] == FALLBACK and self._settings.fallback == EXIT
        )
        if not (at_once and progress.passed):
            asked_s = self._clock.now()
            until_s = AT_ONCE_S if at_once else flight.until_s
            progress = await self._device.go_on(progress, self._device.n_layers, until_s)
            _count(flight, progress, asked_s)
        if place[0] == DEVICE and progress.late:
            place = FALLBACK, "deadline"
        return progress, place

    async def _after_all(
        self, flight: _Flight, progress: Progress, reason: str
    ) -> tuple[Progress, Place]:
        """The cloud has failed this sample: wait for the device's turn while there is time."""
        place = FALLBACK, reason
        turn, asked_s = self._device.turn, self._clock.now()
        patience_s = None if flight.until_s == math.inf else flight.until_s - asked_s
        if progress.passed is not None:
            if reason == "deadline" or self._settings.fallback == EXIT:
                return progress, place
        else:
            patience_s = None  # late is better than never
        try:
            async with asyncio.timeout(patience_s):
                await turn.acquire()
        except TimeoutError:
            return progress, place
        try:
            progress, place = await self._alone(flight, progress, place)
        finally:
            turn.release()
        return progress, place

    async def _in_cloud(self, flight: _Flight, progress: Progress) -> Answer:
        """Raises NotAnswered, at the latest when what is left is needed for an answer here."""
        assert self.session is not None
        assert progress.rest is not None
        rest, asked_s = progress.rest, self._clock.now()
        kept_ms = 0.0
        if progress.passed is None:
            kept_ms = self._device.times.ms(rest.depth, self._exits[0], rest.n_tokens)
        left_s = flight.until_s - asked_s - kept_ms / 1000
        timeout_s = min(left_s, self._settings.offload_timeout_ms / 1000)
        if timeout_s <= 0:
            raise NotAnswered("deadline")
        try:
            async with asyncio.timeout(timeout_s):
                await self.air.acquire()
            try:
                waited_s = self._clock.now() - asked_s
                done = await self.session.finish(
                    rest, timeout_s - waited_s, flight.sample.traceparent, progress.knobs
                )
            finally:
                self.air.release()
        except (TimeoutError, NotAnswered) as error:
            reason = "timeout"
            if isinstance(error, NotAnswered):
                reason, flight.bytes_up = error.reason, error.bytes_up
            late = self._clock.now() >= asked_s + left_s - _TICK_S
            raise NotAnswered("deadline" if late else reason) from error
        return self._finished(flight, progress, done, 1000 * waited_s)

    def _finished(
        self, flight: _Flight, progress: Progress, done: Finished, waited_ms: float
    ) -> Answer:
        """The cloud's answer, and what it cost; `waited_ms` for room in the air."""
        completion = done.completion
        flight.stages = replace(
            flight.stages,
            queue=flight.stages.queue + waited_ms,
            encode=done.encode_ms,
            network=done.network_ms,
            cloud=completion.queue_ms + completion.compute_ms,
        )
        flight.bytes_up, flight.bytes_down = done.bytes_up, done.bytes_down
        passed = Passed(
            int(completion.exit_depth_B[0]),
            completion.answers[0],
            float(completion.confidence_B[0]),
            self._exit_classes(progress.passed, completion),
        )
        return self._answer(flight, passed, (CLOUD, ""))

    def _exit_classes(self, before: Passed | None, done: Completion) -> tuple[int, ...]:
        """What the exits here and there predicted, up to the one that the sample left at."""
        if self._choose is None or done.exit_classes_BE is None:
            return ()
        here = () if before is None else before.exit_classes
        count = sum(depth <= done.exit_depth_B[0] for depth in self._exits)
        return (*here, *done.exit_classes_BE[0].tolist())[:count]

    def _answer(self, flight: _Flight, passed: Passed, place: Place) -> Answer:
        said = label_of(self._task, passed.answer)
        return Answer(
            id=flight.sample.id,
            text=flight.sample.text,
            label=said.label,
            probability=said.probability,
            exit_depth=passed.depth,
            where=place[0],
            reason=place[1],
            split=self.split,
            confidence=passed.confidence,
            ms=1000 * (self._clock.now() - flight.began_s),
            stages_ms=flight.stages,
            bytes_up=flight.bytes_up,
            bytes_down=flight.bytes_down,
            logits=tuple(passed.answer.tolist()) if self._settings.logits else None,
            exit_classes=passed.exit_classes,
        )

    def _told(self, answer: Answer) -> Answer:
        for tell in self.on_answer:
            tell(answer)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("answered %s", answer.to_json())
        return answer


def _count(flight: _Flight, progress: Progress, asked_s: float) -> None:
    """Add one stretch of the device's work, and the wait for it, to what the sample has cost."""
    stages = flight.stages
    flight.stages = replace(
        stages,
        queue=stages.queue + 1000 * (progress.began_s - asked_s),
        device=stages.device + 1000 * (progress.ended_s - progress.began_s),
    )
