"""On the device: whose turn it is, layers, exits, the planner, deadlines, fallback and hedges.

The same rules as offramp_edge's agent.py, device.py, turn.py, rest.py and hedge.py, as events instead of
coroutines; tests/simulate/test_world_against_agent.py runs both over the same requests.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

import numpy as np

from offramp_edge.breaker import ASIDE
from offramp_edge.planning import Standing
from offramp_simulate.results import DEVICE, FALLBACK
from offramp_simulate.world_parts import AIR, DONE, QUEUED, RETRY, RUNNING, WAITING, Flight, Side

if TYPE_CHECKING:
    from offramp_simulate.world import World


_WARM_UP_TOKENS = 16  # as many as the live agent's sentence has


class OnDevice:
    def __init__(self, world: World) -> None:
        self._world, self._clock, self._agent = world, world.clock, world.scenario.agent
        of = world.of
        self._layer_s: list[list[float]] = (of.layer_ms_NL / 1e3).tolist()
        self._leaves: list[int] = of.leaves_N.tolist()
        self._tokens: list[int] = of.tokens_N.tolist()
        self._usual = int(np.argmin(np.abs(of.tokens_N - _WARM_UP_TOKENS)))
        self._sure: list[list[float]] = of.confidence_NE.tolist()
        self._before_s, self._n = of.before_ms / 1e3, of.n_layers
        self._is_exit = [depth in of.exits for depth in range(of.n_layers + 1)]
        self._split = world.plan.split
        self._exits_at_once = self._agent.fallback == "exit"

    def arrived(self, flight: Flight) -> None:
        side = flight.side
        flight.waited = side.busy
        if side.busy:
            side.samples.append(flight)
        else:
            side.busy = True
            self._begin(flight)

    def expected_s(self, flight: Flight, start: int, stop: int) -> float:
        """What the device believes that layers take: the median."""
        return sum(self._layer_s[flight.sample][start:stop])

    def warm_up(self, side: Side) -> None:
        """The device has timed its layers once, on a sample of 16 tokens or so."""
        assert side.times is not None
        for depth, layer_s in enumerate(self._layer_s[self._usual]):
            side.times.ran(depth, self._tokens[self._usual], 1e3 * layer_s)

    def first_exit(self, depth: int) -> int:
        return next(d for d in range(depth + 1, self._n + 1) if self._is_exit[d])

    def after_all(self, flight: Flight, reason: str) -> None:
        """The cloud has failed it: wait for the device's turn while there is time. A hedge's layer that
        is running ends first."""
        flight.alone = flight.trouble or reason
        if reason == "deadline" and flight.passed:
            self._answer(flight, FALLBACK, flight.alone)
            return
        if flight.hedging == "runs":
            flight.hedging, flight.stage = "halting", WAITING
            return
        flight.hedging = ""
        if flight.passed and (self._exits_at_once or flight.left):
            self._answer(flight, FALLBACK, flight.alone)
        else:
            flight.stage = WAITING
            self.arrived(flight)
            if flight.stage == WAITING and flight.passed and flight.until_s < math.inf:
                self._world.at(flight.until_s, self._impatient, flight)

    # The turn: samples in order, then hedges, the oldest sample's first.

    def _release(self, side: Side) -> None:
        while side.samples:
            flight = side.samples.popleft()
            if flight.stage != DONE and (flight.stage == WAITING or flight.hedging == "waits"):
                self._begin(flight)
                return
        while side.hedges:
            _, flight = heapq.heappop(side.hedges)
            if flight.stage != DONE and flight.hedging == "waits":
                self._hedge_layer(flight)
                return
        side.busy = False

    def _begin(self, flight: Flight) -> None:
        """It has the turn."""
        if flight.stage != WAITING:
            self._hedge_layer(flight)
        elif flight.alone:
            flight.stage = RUNNING
            self._run(flight, self._n, self._clock.now_s)
        else:
            flight.stage = RUNNING
            began_s = self._clock.now_s + self._before_s * flight.deviation
            flight.device_ms += 1e3 * (began_s - self._clock.now_s)
            if flight.side.planner is None:
                self._run(flight, self._split, began_s)
            else:
                self._world.at(began_s, self._choose, flight)

    def _choose(self, flight: Flight) -> None:
        side, column = flight.side, self._world.columns.get(flight.passed)
        assert side.planner is not None
        assert side.breaker is not None
        standing = Standing(
            flight.depth,
            self._tokens[flight.sample],
            None if column is None else self._sure[flight.sample][column],
            1e3 * (flight.until_s - self._clock.now_s),
            len(side.samples),
            side.in_flight,
            not side.breaker.refusal(),
            flight.waited,
        )
        choice = side.planner.choose(standing)
        flight.codec = choice.codec
        if choice.stop > flight.depth:
            self._run(flight, choice.stop, self._clock.now_s)
        else:
            self._to_be_sent(flight)

    def _run(self, flight: Flight, stop: int, now_s: float) -> None:
        """Layers from `now_s` on, up to `stop`, where it leaves, where the planner is asked again, or where
        the next layer would be late."""
        layers_s, leaves = self._layer_s[flight.sample], self._leaves[flight.sample]
        deviation, until_s, depth, began_s = flight.deviation, flight.until_s, flight.depth, now_s
        if flight.alone == "deadline" or (flight.alone and self._exits_at_once):
            until_s = -math.inf
        asks, times = flight.side.planner is not None and not flight.alone, flight.side.times
        while depth < stop:
            layer_s = layers_s[depth]
            if flight.passed and now_s + layer_s > until_s:
                flight.late = True
                break
            now_s += layer_s * deviation
            if times is not None:
                times.ran(depth, self._tokens[flight.sample], 1e3 * layer_s * deviation)
            depth += 1
            if self._is_exit[depth]:
                flight.passed = depth
                if depth >= leaves:
                    flight.left = True
                    break
                if asks:
                    break
        flight.depth = depth
        flight.device_ms += 1e3 * (now_s - began_s)
        self._world.at(now_s, self._ran, flight)

    def _ran(self, flight: Flight) -> None:
        """The stretch has ended, and the turn is still this one's."""
        if flight.left or flight.late or flight.alone:
            self._ended(flight)
        elif flight.side.planner is not None:
            self._choose(flight)
        else:
            self._to_be_sent(flight)

    def _ended(self, flight: Flight) -> None:
        side = flight.side
        if flight.alone:
            self._answer(flight, FALLBACK, flight.alone)
            self._release(side)
            return
        self._missed(flight)
        if flight.late:
            self._answer(flight, FALLBACK, "deadline")
        else:
            self._answer(flight, DEVICE, "")
        self._release(side)

    def _to_be_sent(self, flight: Flight) -> None:
        breaker = flight.side.breaker
        assert breaker is not None
        self._missed(flight)
        reason = breaker.refusal()
        if not reason:
            self._release(flight.side)
            self._world.cloud.away(flight)
            return
        flight.alone = reason
        if flight.passed and self._exits_at_once:
            self._ended(flight)
        else:
            self._run(flight, self._n, self._clock.now_s)

    def _missed(self, flight: Flight) -> None:
        """Tell the breaker that a sample would have been welcome to the cloud."""
        breaker = flight.side.breaker
        assert breaker is not None
        if breaker.state == ASIDE:
            self._world.cloud.handshakes.missed(flight.side)

    def _impatient(self, flight: Flight) -> None:
        if flight.stage == WAITING:
            self._answer(flight, FALLBACK, flight.alone)

    # Hedges: layer by layer, behind every sample, while the cloud has it too.

    def hedge(self, flight: Flight, trip: int) -> None:
        """The time has come: from now on the rest runs here too, when nobody else wants the device."""
        if flight.trip == trip and flight.stage in (QUEUED, AIR, RETRY) and not flight.hedging:
            flight.hedging = "waits"
            self._queue_hedge(flight)

    def trouble(self, flight: Flight) -> None:
        """The cloud has failed it once: the rest here takes its turn like any other sample."""
        if flight.hedging in ("", "waits"):
            flight.hedging = "waits"
            self._queue_hedge(flight)

    def _queue_hedge(self, flight: Flight) -> None:
        side = flight.side
        if not side.busy:
            side.busy = True
            self._hedge_layer(flight)
        elif flight.trouble:
            side.samples.append(flight)
        else:
            heapq.heappush(side.hedges, (flight.number, flight))

    def _hedge_layer(self, flight: Flight) -> None:
        """One layer, holding the turn."""
        layer_s = self._layer_s[flight.sample][flight.depth]
        if flight.passed and self._clock.now_s + layer_s > flight.until_s:
            flight.hedging = "late"
            self._release(flight.side)
            return
        flight.hedging = "runs"
        self._world.at(
            self._clock.now_s + layer_s * flight.deviation, self._hedged, flight, layer_s
        )

    def _hedged(self, flight: Flight, layer_s: float) -> None:
        side, ms = flight.side, 1e3 * layer_s * flight.deviation
        if flight.stage == DONE:
            self._world.wasted(ms)
            self._release(side)
            return
        flight.device_ms += ms
        flight.depth += 1
        if self._is_exit[flight.depth]:
            flight.passed = flight.depth
            flight.left = flight.depth >= self._leaves[flight.sample]
        if flight.hedging == "halting":
            flight.hedging = ""
            self._release(side)
            self.after_all(flight, flight.alone)
        elif flight.left:
            self._world.cloud.forget(flight)
            where = FALLBACK if flight.trouble else DEVICE
            self._answer(flight, where, flight.trouble)
            self._release(side)
        elif flight.trouble:
            self._hedge_layer(flight)
        else:  # the turn goes to another one, if one waits, before this one waits for it again
            flight.hedging = "waits"
            self._release(side)
            self._queue_hedge(flight)

    def _answer(self, flight: Flight, where: int, reason: str) -> None:
        column = self._world.columns[flight.passed]
        right = self._world.right[flight.sample][column]
        self._world.answer(flight, where, reason, flight.passed, right)
