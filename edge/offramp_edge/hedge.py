"""The rest of one sample, run on this device while the cloud has it too.

It begins when the cloud's answer is later than usual, and not before: layers that are run for nothing are
energy spent for nothing. It runs in the device's turn, behind every sample that waits, and gives the turn
back after every layer. Where trouble with the cloud is known it is the sample's own turn, kept to the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from offramp_edge.device import Device, Passed, Progress
from offramp_edge.flight import Flight
from offramp_edge.turn import SAMPLE


@dataclass(slots=True)
class HedgeCounts:
    """begun    that ran at least one layer
    won      that came to the sample's end before the cloud's answer
    layers   that ran;  wasted   those of them that decided no answer
    """

    begun: int = 0
    won: int = 0
    layers: int = 0
    wasted: int = 0


class Hedge:
    """Made when a sample is sent; `stop` must be called when it is answered.

    left     done when the sample has left here, as it would have in the cloud
    reason   of the trouble; empty while none is known
    used     to be set where its layers decide the answer
    """

    def __init__(
        self, device: Device, flight: Flight, progress: Progress, counts: HedgeCounts
    ) -> None:
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reason, self.used = "", False
        self._device, self._flight, self._progress = device, flight, progress
        self._counts, self._layers = counts, 0
        self._rank = flight.number
        self._until_depth = 0
        self._stopped = self._running = self._counted = False
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._on_first: Callable[[Passed], None] | None = None

    @property
    def passed(self) -> Passed | None:
        """The deepest exit passed so far, here or before it was sent."""
        return self._progress.passed

    @property
    def ran(self) -> bool:
        """Whether a layer ran, or runs."""
        return self._running or self._layers > 0

    def begin(self, after_s: float) -> None:
        """Run to the end, in so long unless it is stopped before."""
        if after_s <= 0:
            self._run_to(self._device.n_layers)
        else:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(after_s, self._run_to, self._device.n_layers)

    def first(self, depth: int, on_first: Callable[[Passed], None]) -> None:
        """Run to the first exit, at `depth`, at once, and tell what it says."""
        self._on_first = on_first
        self._run_to(depth)

    def trouble(self, reason: str) -> None:
        """The cloud has failed the sample once: from now on it takes its turn like any other."""
        self.reason, self._rank = reason, SAMPLE
        if self._task is not None and not self._running:
            self._task.cancel()  # it may wait in the wrong place
            self._task = None
        self._run_to(self._device.n_layers)

    def stop(self) -> None:
        """No layer more than the one that is running."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None and not self._running:
            self._task.cancel()
        if not self._running:
            self._count()

    async def halted(self) -> Progress:
        """Stop, and how far it came: waits for the layer that is running."""
        self.stop()
        if self._task is not None:
            await asyncio.wait({self._task})
        return self._progress

    def _run_to(self, depth: int) -> None:
        self._until_depth = max(self._until_depth, depth)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while (rest := self._progress.rest) is not None and rest.depth < self._until_depth:
            await self._device.turn.acquire(self._rank)
            self._running = True
            try:
                stop = self._until_depth if self._rank == SAMPLE else rest.depth + 1
                progress = await self._device.go_on(self._progress, stop, self._flight.until_s)
            finally:
                self._running = False
                self._device.turn.release()
            self._layers += _depth(progress) - rest.depth
            self._flight.ran(progress, progress.began_s)
            self._progress = progress
            self._tell()
            if self._stopped or progress.late:
                break
        if self._stopped:
            self._count()

    def _tell(self) -> None:
        if self._on_first is not None and self.passed is not None:
            self._on_first(self.passed)
            self._on_first = None
        if self._progress.rest is None and not self.left.done():
            self.left.set_result(None)

    def _count(self) -> None:
        if not self._layers or self.reason or self._counted:
            return
        self._counted = True
        self._counts.begun += 1
        self._counts.layers += self._layers
        self._counts.won += self.used and self.left.done()
        self._counts.wasted += 0 if self.used else self._layers


def _depth(progress: Progress) -> int:
    """How many layers have run."""
    if progress.rest is not None:
        return progress.rest.depth
    assert progress.passed is not None, "a sample that left without an exit"
    return progress.passed.depth
