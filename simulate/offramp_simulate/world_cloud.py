"""Off the device: room in the air, the link, the cloud, time-outs, retries, handshakes and faults.

The same rules as offramp_edge's offloads.py and session.py, as events. The gateway is a delay; engines are
engine_model's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from offramp_edge.breaker import ASIDE, Breaker
from offramp_simulate.engine_model import Job
from offramp_simulate.farm import Busy
from offramp_simulate.results import CLOUD
from offramp_simulate.world_faults import Faults
from offramp_simulate.world_handshake import Handshakes
from offramp_simulate.world_link import OnLink
from offramp_simulate.world_parts import AIR, LOST, QUEUED, RETRY, Flight, Side, breaker_for
from offramp_simulate.world_probes import Probe, Probes
from offramp_simulate.world_retries import Retries

if TYPE_CHECKING:
    from offramp_simulate.world import World

_TICK_S = 0.001  # as in the live agent: an event loop's timers are no finer


class InCloud:
    def __init__(self, world: World) -> None:
        self._world, self._clock, self._agent = world, world.clock, world.scenario.agent
        self._timeout_s = self._agent.offload_timeout_ms / 1e3
        self._tokens: list[int] = world.of.tokens_N.tolist()
        self._n = world.of.n_layers
        gateway_ms = world.scenario.cloud.gateway_ms
        header = world.record.header
        gateway_ms = header.gateway_ms if gateway_ms < 0 else gateway_ms
        self.hop_s = gateway_ms / 2e3 + world.farm.times.fixed_s / 2
        self.rtt_s = world.profile.rtt_ms / 1e3
        self.down_nbytes = header.response_nbytes + world.scenario.link.beside_nbytes
        # The live device always estimates its link; it matters to planners, and to who waits in an outage.
        faulty = bool(world.scenario.faults) or world.profile.trace is not None
        self.estimates = world.planner_for is not None or faulty
        self.in_air: dict[int, Flight] = {}
        self.faults = Faults(world, self)
        self.link = OnLink(world, self.faults, self.hop_s)
        self.handshakes = Handshakes(world, self)
        self.retries = Retries(world, self)
        self.probes = Probes(world, self)

    def breaker_of(self, side: Side) -> Breaker:
        def lost() -> None:
            side.put_aside += 1
            self._world.at(self._clock.now_s, self._give_up_waiting, side)

        return breaker_for(side, self._agent, self._clock, self._world.chance, lost)

    def away(self, flight: Flight) -> None:
        """It has left the device's turn, to be run in the cloud."""
        now_s, side = self._clock.now_s, flight.side
        until_s = flight.until_s
        if not flight.passed:
            first = self._world.device.first_exit(flight.depth)
            until_s -= self._world.device.expected_s(flight, flight.depth, first)
        flight.cloud_until_s, flight.give_up_s = until_s, min(until_s, now_s + self._timeout_s)
        flight.asked_s = now_s
        flight.cut = flight.depth  # the hidden state that travels, whatever a hedge runs meanwhile
        if flight.give_up_s <= now_s:
            flight.cut = -1
            self._world.device.after_all(flight, "deadline")
            return
        side.in_flight += 1
        side.budget.requested()
        flight.trip += 1
        self.in_air[flight.number] = flight
        self._world.at(flight.give_up_s, self._gave_up, flight)
        self._arm(flight)
        self.board(flight)

    def forget(self, flight: Flight) -> None:
        """It was answered on the device: nobody waits for the cloud any more."""
        flight.side.usual.given_up(flight.asked_s, self._clock.now_s)
        if flight.transfer is not None:
            flight.side.link.dropped(flight.transfer)
        self.link.cancel(flight)
        self._over(flight)

    def finished(self, batch: list[Job]) -> None:
        """Engines are done with these, now."""
        leaves_s = self._clock.now_s + self.hop_s
        for job in batch:
            flight = job.key
            if job.wanted_s == -math.inf:
                continue  # the connection is lost, or its cancel has come
            if isinstance(flight, Probe):
                self.probes.finished(flight, job)
                continue
            assert isinstance(flight, Flight)
            if flight.job is not job or flight.stage != AIR:
                self._world.beside(self.down_nbytes)
            job.reports_ms = job.queue_ms(self._clock.now_s), 1e3 * job.ran_s
            down, nbytes = flight.side.down, self.down_nbytes
            self.link.carry(down, nbytes, leaves_s, self._answered, flight, job)

    # Into the air.

    def _arm(self, flight: Flight) -> None:
        """When the rest begins here too: as Rest._hedge_after_s."""
        factor, side = self._agent.hedge_after, flight.side
        if factor == math.inf or self._agent.fallback == "exit":
            return
        late_s = side.usual.late_s
        left_s = min(flight.until_s - self._clock.now_s, self._timeout_s)
        here_s = self._world.device.expected_s(flight, flight.depth, self._n)
        latest_s = left_s - here_s if factor else 0.0
        if late_s is None:
            after_s = latest_s
        else:
            after_s = factor * late_s if side.usual.known else min(factor * late_s, latest_s)
        when_s = self._clock.now_s + max(after_s, 0.0)
        self._world.at(when_s, self._world.device.hedge, flight, flight.trip)

    def board(self, flight: Flight) -> None:
        side = flight.side
        if side.air < self._agent.max_in_flight:
            side.air += 1
            self._send(flight)
        else:
            flight.stage = QUEUED
            side.queued.append(flight)

    def _land(self, side: Side) -> None:
        """Room in the air."""
        side.air -= 1
        while side.queued and side.air < self._agent.max_in_flight:
            flight = side.queued.popleft()
            if flight.stage == QUEUED:
                side.air += 1
                self._send(flight)

    def _send(self, flight: Flight) -> None:
        side, breaker = flight.side, flight.side.breaker
        assert breaker is not None
        flight.stage = AIR
        if reason := breaker.refusal():
            self._land(side)
            self.retries.failed(flight, reason)
            return
        breaker.at_work += 1
        flight.sent = True
        flight.welcomes = breaker.welcomes
        side.at_air[flight.number] = flight
        _, up, _, _, encode_ms = self._world.cut_at(flight.cut, flight.codec)
        if self.estimates:
            layers = self._n - flight.cut
            expected_ms = side.cloud_times.queue_ms
            expected_ms += layers * side.cloud_times.layer_ms(self._tokens[flight.sample])
            flight.transfer = side.link.sent(
                up[flight.sample] - self._world.scenario.link.beside_nbytes, expected_ms
            )
        self.handshakes.expects(side, self._doubt, flight, flight.trip)
        flight.ready_s = self._clock.now_s + encode_ms[flight.sample] * flight.deviation / 1e3
        self._world.at(flight.ready_s, self._on_link, flight, flight.trip)

    def _on_link(self, flight: Flight, trip: int) -> None:
        if flight.stage != AIR or flight.trip != trip:
            return
        fault = self.faults.now("link")
        if fault is not None and fault.how == "refused":
            self.lose(flight, "unavailable")
            return
        nbytes = self._world.cut_at(flight.cut, flight.codec)[1][flight.sample]
        flight.up_nbytes += nbytes
        self.link.carry(flight.side.up, nbytes, self._clock.now_s, self._at_gateway, flight, trip)

    def _at_gateway(self, flight: Flight, trip: int) -> None:
        self._world.at(self._clock.now_s + self.hop_s, self._at_cloud, flight, trip)

    def _at_cloud(self, flight: Flight, trip: int) -> None:
        if flight.stage != AIR or flight.trip != trip or flight.job is LOST:
            return
        fault = self.faults.now("cloud")
        if fault is not None:
            if fault.how == "refused":
                back_s = self._clock.now_s + self.rtt_s / 2
                self._world.at(back_s, self._lost_later, flight, trip, "unavailable")
            return
        exit = self._world.cut_at(flight.cut, flight.codec)[2][flight.sample]
        job = Job(
            flight, flight.cut, exit, self._tokens[flight.sample], flight.engine_deviation,
            flight.give_up_s,
        )  # fmt: skip
        flight.job = job
        try:
            self._world.farm.offer(job, self._clock.now_s)
        except Busy as busy:
            back_s = self._clock.now_s + self.hop_s + self.rtt_s / 2
            self._world.at(back_s, self._refused, flight, trip, busy)

    # Out of the air.

    def _answered(self, flight: Flight, job: Job) -> None:
        if flight.stage != AIR or flight.job is not job:
            return
        side, breaker, now_s = flight.side, flight.side.breaker, self._clock.now_s
        assert breaker is not None
        side.usual.took(now_s - flight.asked_s)
        self.handshakes.told(side, now_s - flight.asked_s)
        if flight.transfer is not None:
            queue_ms, compute_ms = job.reports_ms
            side.cloud_times.ran(job.exit - job.entered, job.tokens, queue_ms, compute_ms)
            side.link.answered(flight.transfer, queue_ms + compute_ms)
        self._over(flight)
        _, _, exits, right, _ = self._world.cut_at(flight.cut, flight.codec)
        self._world.answer(
            flight, CLOUD, "", exits[flight.sample], right[flight.sample], self.down_nbytes
        )

    def _gave_up(self, flight: Flight) -> None:
        """The longest wait is over."""
        if flight.stage not in (QUEUED, AIR, RETRY):
            return
        if flight.stage == AIR:
            self.lose(flight, "timeout")
        else:
            self.not_answered(flight, flight.trouble or "timeout")

    def _refused(self, flight: Flight, trip: int, busy: Busy) -> None:
        """The cloud's refusal arrives."""
        if flight.stage == AIR and flight.trip == trip:
            self.lose(flight, str(busy), busy.retry_s)

    def _lost_later(self, flight: Flight, trip: int, reason: str) -> None:
        if flight.stage == AIR and flight.trip == trip:
            self.lose(flight, reason)

    def lose(self, flight: Flight, reason: str, retry_s: float = 0.0) -> None:
        """This attempt has failed: tell the breaker, and try again or not."""
        side, breaker = flight.side, flight.side.breaker
        assert breaker is not None
        if reason == "timeout":
            self.link.cancel(flight)
        if flight.transfer is not None:
            known = reason in ("timeout", "unavailable")
            (side.link.failed if known else side.link.dropped)(flight.transfer)
            flight.transfer = None
        self._out_of_air(flight)
        if retry_s > 0:
            breaker.busy_for(retry_s, "")
        else:
            breaker.failed(reason, "", flight.welcomes)
        self.handshakes.asked(side)
        self.retries.failed(flight, reason)

    def not_answered(self, flight: Flight, reason: str) -> None:
        late = self._clock.now_s >= flight.cloud_until_s - _TICK_S
        self._over(flight)
        self._world.device.after_all(flight, "deadline" if late else reason)

    def _over(self, flight: Flight) -> None:
        """No attempt of it is in the air any more, nor will be."""
        if flight.stage == AIR:
            self._out_of_air(flight)
        flight.side.in_flight -= 1
        flight.job, flight.transfer = None, None
        flight.trip += 1
        flight.stage = QUEUED  # neither in the air nor answered: the caller says what comes next
        self.in_air.pop(flight.number, None)

    def _out_of_air(self, flight: Flight) -> None:
        side, breaker = flight.side, flight.side.breaker
        assert breaker is not None
        if side.at_air.pop(flight.number, None) is not None:
            breaker.at_work -= 1
            flight.stage = RETRY
            self._land(side)

    def _doubt(self, flight: Flight, trip: int) -> None:
        if flight.stage == AIR and flight.trip == trip:
            self.handshakes.doubted(flight.side)

    def _give_up_waiting(self, side: Side) -> None:
        """The cloud was put aside: whoever waits for it need not."""
        breaker = side.breaker
        assert breaker is not None
        if breaker.state != ASIDE:
            return
        for flight in list(side.at_air.values()):
            if flight.stage == AIR:
                if flight.transfer is not None:
                    side.link.failed(flight.transfer)
                    flight.transfer = None
                self.link.cancel(flight)
                self._out_of_air(flight)
                self.retries.failed(flight, breaker.reason)
        self.probes.given_up(side)
