"""Greetings over the link: offramp_edge's greetings.py and the connections of grpc_transport.py, as events.

One that is not answered soon is not given up yet: another one follows, over a connection of its own, and
whichever is answered first counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offramp_edge.breaker import UP
from offramp_edge.greetings import patience_ms
from offramp_simulate.beside import CONNECTING, GREETING
from offramp_simulate.scenario_parts import Fault
from offramp_simulate.world_parts import GREETS, Side

if TYPE_CHECKING:
    from offramp_simulate.world import World
    from offramp_simulate.world_cloud import InCloud
    from offramp_simulate.world_handshake import Handshakes


class Greeting:
    """`legs` to come: (up, down) bytes, each a round trip. `fresh`: over a connection of its own."""

    __slots__ = ("fresh", "legs", "side")

    def __init__(self, side: Side, fresh: bool) -> None:
        self.side, self.fresh = side, fresh
        self.legs: tuple[tuple[int, int], ...] = CONNECTING if fresh else GREETING


class Greetings:
    def __init__(self, world: World, cloud: InCloud, handshakes: Handshakes) -> None:
        self._world, self._cloud, self._handshakes = world, cloud, handshakes
        self._clock = world.clock
        self._longest_ms = world.scenario.agent.probe_timeout_ms

    def greet(self, side: Side) -> None:
        """Another one; `Handshakes.replied` is told what comes of it, or of one before it."""
        now_s = self._clock.now_s
        side.asking = GREETS
        side.greeted += 1
        fault = self._fault()
        if side.welcome:  # one of those before was answered while nobody listened
            side.greetings.clear()
            self._world.at(now_s, self._welcomed, side)
        elif fault is not None and fault.how == "refused":
            side.connected = False
            takes_s = self._cloud.rtt_s if fault.what == "cloud" else 0.0
            self._world.at(now_s + takes_s, self._ends, side, side.greeted, "unavailable")
        else:
            self._send(side)
            patience_s = self._patience_ms(side) / 1e3
            self._world.at(now_s + patience_s, self._ends, side, side.greeted, "timeout")

    def _send(self, side: Side) -> None:
        fresh = bool(side.greetings) or not side.connected
        greeting = Greeting(side, fresh)
        side.greetings.append(greeting)
        self._world.at(self._clock.now_s + self._longest_ms / 1e3, self._too_old, greeting)
        self._leg(greeting)

    def _patience_ms(self, side: Side) -> float:
        """A few round trips on a link that is known, and short where the cloud is aside already."""
        assert side.breaker is not None
        if side.breaker.state != UP:
            return patience_ms(self._longest_ms, 0.0)
        if self._cloud.estimates:
            return patience_ms(self._longest_ms, side.link.estimate().rtt_ms or self._longest_ms)
        return patience_ms(self._longest_ms, 1e3 * self._cloud.rtt_s)

    def _leg(self, greeting: Greeting) -> None:
        up = greeting.legs[0][0]
        self._world.beside(up)
        self._cloud.link.carry(greeting.side.up, up, self._clock.now_s, self._there, greeting)

    def _there(self, greeting: Greeting) -> None:
        fault = self._fault()
        if fault is not None and fault.what == "cloud":
            return  # swallowed, or refused to another one by then
        (_, down), *others = greeting.legs
        self._world.beside(down)
        # TCP and TLS are the machine's; a greeting goes through the gateway.
        when_s = self._clock.now_s + (0.0 if others else 2 * self._cloud.hop_s)
        self._cloud.link.carry(greeting.side.down, down, when_s, self._back, greeting)

    def _back(self, greeting: Greeting) -> None:
        side = greeting.side
        greeting.legs = greeting.legs[1:]
        waits = greeting in side.greetings  # not given up, and no other was answered and counted
        if greeting.legs and (waits or greeting.legs == CONNECTING[1:]):
            self._leg(greeting)  # TLS begins as soon as TCP is there, whoever waits for it
            return
        if not waits:
            return
        # Those beside it go on until somebody listens, and the last new connection stays.
        side.greetings.remove(greeting)
        side.connected = side.welcome = True
        if greeting.fresh:
            self._world.pings.connected(side.number)
        if side.asking == GREETS:
            side.greetings.clear()
            self._welcomed(side)

    def _too_old(self, greeting: Greeting) -> None:
        if greeting in greeting.side.greetings:
            greeting.side.greetings.remove(greeting)
            greeting.side.connected = False  # as good as: the next one takes another connection

    def _welcomed(self, side: Side) -> None:
        side.welcome = False
        # A fault that began while the greeting was in the air.
        self._handshakes.replied(side, "unavailable" if self._fault() is not None else "")

    def _ends(self, side: Side, greeted: int, reason: str) -> None:
        if side.asking == GREETS and side.greeted == greeted:
            self._handshakes.replied(side, reason)

    def _fault(self) -> Fault | None:
        return self._cloud.faults.now("link") or self._cloud.faults.now("cloud")
