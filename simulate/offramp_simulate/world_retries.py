"""Who is sent again after the cloud has failed it once: as offramp_edge.offloads, as events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offramp_common.retry import Backoff
from offramp_edge.breaker import UP
from offramp_simulate.world_parts import RETRY, Flight

if TYPE_CHECKING:
    from offramp_simulate.world import World
    from offramp_simulate.world_cloud import InCloud


class Retries:
    def __init__(self, world: World, cloud: InCloud) -> None:
        self._world, self._cloud, self._agent = world, cloud, world.scenario.agent
        longest_ms = self._agent.backoff_max_ms
        self._backoff = Backoff(min(self._agent.retry_ms, longest_ms) / 1e3, longest_ms / 1e3)

    def failed(self, flight: Flight, reason: str) -> None:
        side, now_s = flight.side, self._world.clock.now_s
        flight.job = None
        again = reason == "unavailable" and self._agent.fallback == "finish"
        if again and flight.sent and now_s < flight.give_up_s and side.budget.take():
            flight.stage, flight.trouble = RETRY, reason
            flight.trip += 1
            self._world.device.trouble(flight)
            wait_s = self._backoff.wait_s(flight.attempts, self._cloud.handshakes.rng_of(side))
            flight.attempts += 1
            self._world.at(now_s + wait_s, self.again, flight, flight.trip)
        else:
            self._cloud.not_answered(flight, reason)

    def again(self, flight: Flight, trip: int) -> None:
        """The wait is over: send it once the cloud is up."""
        if flight.stage != RETRY or flight.trip != trip:
            return
        breaker = flight.side.breaker
        assert breaker is not None
        if breaker.state == UP:
            self._cloud.board(flight)
        else:
            self._cloud.handshakes.wait(flight, trip)
