"""A sample on its way through device and cloud: until when it is to be answered, and what it has cost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from offramp_edge.answers import Sample, Stages
from offramp_edge.device import Passed, Progress
from offramp_edge.session import Finished
from offramp_edge.trace import Trace
from offramp_edge.turn import SAMPLE

Place = tuple[str, str]
"""Where a sample is answered, and the reason if that is a fallback."""


@dataclass(frozen=True, slots=True, eq=False)
class Ending:
    """`complete`: as Answer.complete."""

    passed: Passed
    place: Place
    complete: bool

    @classmethod
    def of(cls, progress: Progress, place: Place) -> Ending:
        assert progress.passed is not None, "a sample without an answer"
        return cls(progress.passed, place, progress.rest is None)


@dataclass(slots=True)
class Flight:
    """number       counts the agent's samples
    until_s      the clock by which it is answered; infinity without a deadline
    off_device   set when the device has room for the next
    sent         the depth at which it was sent to the cloud; None where it was not
    hedge, spooled, codec   as in Answer
    rank         in the device's turn;  waited: it had to wait for that
    trace        its spans, where somebody wants them
    """

    sample: Sample
    number: int
    began_s: float
    until_s: float
    off_device: asyncio.Event
    stages: Stages = field(default_factory=Stages)
    bytes_up: int = 0
    bytes_down: int = 0
    sent: int | None = None
    hedge: str = ""
    spooled: bool = False
    codec: str = ""
    rank: int = SAMPLE
    waited: bool = False
    trace: Trace | None = None

    def ran(self, progress: Progress, asked_s: float) -> None:
        """The device ran a stretch of it, which had waited since `asked_s`."""
        self.stages = replace(
            self.stages,
            queue=self.stages.queue + 1000 * (progress.began_s - asked_s),
            device=self.stages.device + 1000 * (progress.ended_s - progress.began_s),
        )
        if self.trace is not None:
            self.trace.ran(asked_s, progress.began_s, progress.ended_s)

    def sends(self, depth: int) -> str:
        """It is on its way to the cloud; the trace context to send along."""
        self.sent = depth
        return self.sample.traceparent if self.trace is None else self.trace.sends()

    def gave_up(self, reason: str, bytes_up: int) -> None:
        """The cloud has not answered it, this time."""
        self.bytes_up += bytes_up
        if self.trace is not None:
            self.trace.gave_up(reason)

    def finished(self, done: Finished, waited_ms: float) -> None:
        """The cloud ran the rest; it had waited so long for room in the air."""
        self.stages = replace(
            self.stages,
            queue=self.stages.queue + waited_ms,
            encode=done.encode_ms,
            network=done.network_ms,
            cloud=done.completion.queue_ms + done.completion.compute_ms,
        )
        self.bytes_up += done.bytes_up
        self.bytes_down = done.bytes_down
        self.codec = done.codec
        if self.trace is not None:
            self.trace.answered(done.encode_ms)
