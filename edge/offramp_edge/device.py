"""The device's compute: one thread that tokenizes and runs layers, one sample at a time.

Samples are run alone: on one core a batch costs what its rows cost one after another, and each row
would wait for the others. Between layers the deadline is looked at, so a sample that is late stops
at the deepest exit it has passed. Behind each exit the planner says in the same thread, without a way
back to the event loop, how far to go.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from offramp_common.activations import Activations, NumpyArray
from offramp_common.clock import Clock
from offramp_common.exit_classes import classes_of
from offramp_common.runner import Knobs, Layers, Leaving, run
from offramp_common.text import Text
from offramp_edge.planning import Choice
from offramp_edge.turn import Turn

R = TypeVar("R")
Encode = Callable[[Sequence[Text]], Activations[NumpyArray]]

AT_ONCE_S = -math.inf
"""A deadline that has passed: run no further than the first exit."""


@dataclass(frozen=True, slots=True, eq=False)
class Passed:
    """What the deepest exit head passed so far says of the sample: answer (C,).

    exit_classes   what it and all exits before it predicted; empty unless the sample's exit was chosen
    """

    depth: int
    answer: NDArray[np.float32]
    confidence: float
    exit_classes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """How far the device came with one sample.

    rest      what is left to run; None once the sample has left, with `passed` as its answer
    passed    the deepest exit's view; None while none has been passed
    late      the deadline stopped it before the depth that was asked for
    began_s, ended_s   on the clock, of the latest stretch
    knobs     the sample's own, where its exit was chosen beforehand
    codec     by which the rest is to be sent, as the planner has it; empty: the two sides' usual one
    """

    rest: Activations[NumpyArray] | None
    passed: Passed | None
    late: bool
    began_s: float
    ended_s: float
    knobs: Knobs | None = None
    codec: str = ""


Choose = Callable[[Activations[NumpyArray], Passed | None, float], Choice]
"""How far to run, given what is left, the deepest exit passed and the time on the clock. Called in the
device's thread: at the start, behind every exit, and at the depth that it chose."""


class LayerTimes:
    """Milliseconds that each layer takes, from those that ran: a moving average per token, for a
    layer's time grows with its tokens."""

    _FEWEST_TOKENS = 16  # below this a layer costs about the same
    _NEW = 0.2  # weight of the latest run

    def __init__(self, n_layers: int) -> None:
        self._ms_per_token: list[float | None] = [None] * n_layers

    def ran(self, depth: int, n_tokens: int, ms: float) -> None:
        """The layer behind `depth` ran."""
        ms /= max(n_tokens, self._FEWEST_TOKENS)
        known = self._ms_per_token[depth]
        self._ms_per_token[depth] = ms if known is None else known + self._NEW * (ms - known)

    def ms(self, start: int, stop: int, n_tokens: int) -> float:
        """Expected milliseconds of layers [start, stop); one that never ran counts nothing."""
        per_token = sum(known or 0.0 for known in self._ms_per_token[start:stop])
        return per_token * max(n_tokens, self._FEWEST_TOKENS)


class Device:
    """Runs layers for one sample after another. `turn` is held by whoever's sample is running."""

    def __init__(
        self,
        layers: Layers[NumpyArray],
        encode: Encode,
        knobs: Knobs,
        clock: Clock,
        executor: Executor,
    ) -> None:
        """`executor` has one thread: layers are never run by two at once."""
        self.n_layers = layers.n_layers
        self.turn = Turn()
        self.times = LayerTimes(layers.n_layers)
        self._layers, self._encode, self._knobs = layers, encode, knobs
        self._clock, self._executor = clock, executor

    async def begin(
        self, text: Text, choose: Choose, until_s: float, knobs: Knobs | None = None
    ) -> Progress:
        """Tokenize and run as far as `choose` says, or less where the clock would pass `until_s`.
        `knobs` are the sample's own, where its exit was chosen beforehand.

        Raises ConfigError when the text is not what the model takes."""
        return await self._in_thread(lambda: self._begin(text, choose, until_s, knobs))

    async def go_on(self, progress: Progress, stop: int, until_s: float) -> Progress:
        """Run the rest of `progress` up to `stop`, or to an exit before `until_s`; where no exit
        was passed yet, at least to the first one on the way."""
        choice = Choice(stop)
        return await self._in_thread(
            lambda: self._advance(progress, lambda *_: choice, until_s, self._clock.now())
        )

    async def warm_up(self, text: Text) -> None:
        """Run every layer once, so that the first sample is not slow and layer times are known."""
        async with self.turn:
            await self._in_thread(lambda: self._warm_up(text))

    async def _in_thread(self, call: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def _begin(self, text: Text, choose: Choose, until_s: float, knobs: Knobs | None) -> Progress:
        began_s = self._clock.now()
        start = Progress(self._encode([text]), None, False, began_s, began_s, knobs)
        return self._advance(start, choose, until_s, began_s)

    def _advance(
        self, progress: Progress, choose: Choose, until_s: float, began_s: float
    ) -> Progress:
        rest, passed, now_s = progress.rest, progress.passed, self._clock.now()
        assert rest is not None, "a sample that has left"
        late, choice = False, choose(rest, passed, now_s)
        while rest.depth < choice.stop:
            expected_ms = self.times.ms(rest.depth, rest.depth + 1, rest.n_tokens)
            late = passed is not None and now_s + expected_ms / 1000 > until_s
            if late:
                break
            left, seen = self._layer(rest, progress.knobs)
            now_s = self._clock.now()
            if seen is not None:
                passed = _passed(seen) if progress.knobs is None else _noted(seen, passed)
            if left is None:
                return Progress(None, passed, False, began_s, now_s, progress.knobs)
            rest = left
            if seen is not None or rest.depth >= choice.stop:
                choice = choose(rest, passed, now_s)
        return Progress(rest, passed, late, began_s, now_s, progress.knobs, choice.codec)

    def _layer(
        self, rest: Activations[NumpyArray], chosen: Knobs | None
    ) -> tuple[Activations[NumpyArray] | None, Leaving[NumpyArray] | None]:
        """(what is left behind the next layer, what its exit says if there is one)."""
        before_s = self._clock.now()
        ran = run(self._layers, rest, rest.depth + 1, self._knobs if chosen is None else chosen)
        self.times.ran(rest.depth, rest.n_tokens, 1000 * (self._clock.now() - before_s))
        return ran.rest, ran.left[0] if ran.left else ran.provisional

    def _warm_up(self, text: Text) -> None:
        acts = self._encode([text])
        for _ in range(2):  # the first pass is slow: its times are overwritten by the second's
            rest = acts
            self.times = LayerTimes(self.n_layers)
            while rest.depth < self.n_layers:
                before_s = self._clock.now()
                step = self._layers.step(rest, self._knobs)
                self.times.ran(rest.depth, rest.n_tokens, 1000 * (self._clock.now() - before_s))
                rest = step.acts


def _passed(leaving: Leaving[NumpyArray]) -> Passed:
    return Passed(leaving.depth, leaving.answer[0], float(leaving.confidence_B[0]))


def _noted(leaving: Leaving[NumpyArray], before: Passed | None) -> Passed:
    """With the classes of all exits passed."""
    classes = () if before is None else before.exit_classes
    return replace(_passed(leaving), exit_classes=(*classes, int(classes_of(leaving.answer)[0])))
