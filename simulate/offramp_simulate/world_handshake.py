"""How a device comes back to the cloud: the breaker's pauses, greetings, and who waits for them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from offramp_edge.breaker import ASIDE, UP
from offramp_edge.greetings import DOUBTS_APART_S
from offramp_edge.link import Transfer
from offramp_simulate.world_greetings import Greetings
from offramp_simulate.world_parts import IDLE, PAUSED, Flight, Side

if TYPE_CHECKING:
    from offramp_simulate.world import World
    from offramp_simulate.world_cloud import InCloud

_PROBE_TOKENS = (16, 1)  # in turns, as in the live session


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
            rng = random.Random(f"{self._world.scenario.seed}/retry/{side.number}")
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

    def wait(self, flight: Flight, trip: int) -> None:
        """Tell the flight when the cloud is up."""
        self._waiting.setdefault(flight.side.number, []).append((flight, trip))

    def probe(self, side: Side) -> None:
        """A sample without content goes to the cloud and back, for what it tells of the link."""
        if self._cloud.faults or side.probing:
            return
        side.probing = True
        tokens = _PROBE_TOKENS[side.probes % len(_PROBE_TOKENS)]
        side.probes += 1
        nbytes = self._world.probe_nbytes(tokens)
        engine_s = self._world.farm.times.alone_s(self._world.probe_layers, tokens)
        now_s = self._clock.now_s
        transfer = side.link.sent(nbytes - self._world.scenario.link.beside_nbytes, 1e3 * engine_s)
        self._world.beside(nbytes + self._cloud.down_nbytes)
        self._cloud.link.carry(
            side.up, nbytes, now_s, self._probe_there, side, transfer, tokens, engine_s
        )

    def _probe_there(self, side: Side, transfer: Transfer, tokens: int, engine_s: float) -> None:
        back_s = self._clock.now_s + 2 * self._cloud.hop_s + engine_s
        self._world.at(back_s, self._probe_back, side, transfer, tokens, engine_s)

    def _probe_back(self, side: Side, transfer: Transfer, tokens: int, engine_s: float) -> None:
        cloud, now_s = self._cloud, self._clock.now_s
        told = side, transfer, tokens, engine_s
        cloud.link.carry(side.down, cloud.down_nbytes, now_s, self._probe_ends, *told)

    def _probe_ends(self, side: Side, transfer: Transfer, tokens: int, engine_s: float) -> None:
        side.probing = False
        self._world.pings.replied(side.number, self._clock.now_s)
        side.link.answered(transfer, 1e3 * engine_s)
        # The cloud reports what a probe took as it does for a sample.
        side.cloud_times.ran(self._world.probe_layers, tokens, 0.0, 1e3 * engine_s)

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
