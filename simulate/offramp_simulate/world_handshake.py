"""How a device comes back to the cloud: the breaker's pauses, greetings, and who waits for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from offramp_edge.breaker import ASIDE, UP
from offramp_edge.greetings import DOUBTS_APART_S, doubt_s, usual_after
from offramp_simulate.world_greetings import Greetings
from offramp_simulate.world_parts import IDLE, PAUSED, Flight, Side

if TYPE_CHECKING:
    from offramp_simulate.world import World
    from offramp_simulate.world_cloud import InCloud


class Handshakes:
    """CloudSession.keep, as events."""

    def __init__(self, world: World, cloud: InCloud) -> None:
        self._world, self._cloud, self._agent = world, cloud, world.scenario.agent
        self._clock = world.clock
        self._waiting: dict[int, list[tuple[Flight, int]]] = {}
        self._rngs: dict[int, random.Random] = {}
        self._greetings = Greetings(world, cloud, self)

    def rng_of(self, side: Side) -> random.Random:
        rng = self._rngs.get(side.number)
        if rng is None:
            rng = random.Random(f"{self._world.chance}/retry/{side.number}")
            self._rngs[side.number] = rng
        return rng

    def asked(self, side: Side) -> None:
        """A greeting may be wanted."""
        breaker = side.breaker
        assert breaker is not None
        if side.asking != IDLE or not breaker.ask.is_set():
            return
        side.asking = PAUSED
        if breaker.state == UP:  # a doubt, soon after a good handshake, can wait
            self._world.at(
                max(self._clock.now_s, side.greeted_s + DOUBTS_APART_S), self._pause, side
            )
        else:
            self._pause(side)

    def missed(self, side: Side) -> None:
        """A sample would have been welcome to the cloud."""
        breaker = side.breaker
        assert breaker is not None
        breaker.missed.set()
        if side.asking == PAUSED and side.wait_missed:
            side.wait_missed += 1
            self._greet(side)

    def expects(self, side: Side, call: Callable[..., None], *args: Any) -> None:
        """Something is sent now: `call` when its answer is so late that the cloud may be gone."""
        if side.usual_s is not None:
            self._world.at(self._clock.now_s + doubt_s(side.usual_s), call, *args)

    def doubted(self, side: Side) -> None:
        """It is so late, and still in the air."""
        assert side.breaker is not None
        side.breaker.ask.set()
        self.asked(side)

    def told(self, side: Side, took_s: float) -> None:
        """The cloud has answered it, after so long."""
        assert side.breaker is not None
        side.breaker.answered()
        side.usual_s = usual_after(side.usual_s, took_s)

    def wait(self, flight: Flight, trip: int) -> None:
        """Tell the flight when the cloud is up."""
        self._waiting.setdefault(flight.side.number, []).append((flight, trip))

    def _pause(self, side: Side) -> None:
        breaker = side.breaker
        assert breaker is not None
        soon_s, longest_s = breaker.pauses()
        side.wait_missed = 0
        now_s = self._clock.now_s
        if breaker.state != ASIDE:
            self._world.at(now_s + longest_s, self._greet, side)
            return
        breaker.missed.clear()
        self._world.at(now_s + soon_s, self._soon, side, now_s + longest_s)

    def _soon(self, side: Side, longest_s: float) -> None:
        breaker = side.breaker
        assert breaker is not None
        if breaker.missed.is_set():
            self._greet(side)
            return
        side.wait_missed = 1
        self._world.at(longest_s, self._at_last, side)

    def _at_last(self, side: Side) -> None:
        if side.asking == PAUSED and side.wait_missed == 1:
            self._greet(side)

    def _greet(self, side: Side) -> None:
        assert side.breaker is not None
        side.breaker.ask.clear()
        side.wait_missed = 0
        self._greetings.greet(side)

    def replied(self, side: Side, reason: str) -> None:
        """What came of the greeting; no reason: it was welcome."""
        breaker = side.breaker
        assert breaker is not None
        side.asking = IDLE
        if reason:
            breaker.failed(reason, "")
            self.asked(side)
            return
        breaker.welcomed()
        side.greeted_s = self._clock.now_s
        for flight, trip in self._waiting.pop(side.number, []):
            self._cloud.retries.again(flight, trip)
        self.asked(side)
