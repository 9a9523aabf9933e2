"""Probes of a link: how a planner learns of a cloud that it sends nothing to. CloudSession.probe, as events.

A probe is a sample without content. It takes the link and an engine like any other, and what becomes of it is
told to breaker and estimates like any other; only room in the air it needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offramp_edge.breaker import UP
from offramp_edge.greetings import doubt_s
from offramp_edge.link import Transfer
from offramp_edge.requests import PROBE_TOKENS
from offramp_simulate.engine_model import Job
from offramp_simulate.farm import Busy
from offramp_simulate.world_parts import LOST, Side

if TYPE_CHECKING:
    from offramp_simulate.world import World
    from offramp_simulate.world_cloud import InCloud


class Probe:
    """One on its way. `job` once it is at an engine; `over`: answered, failed or given up."""

    __slots__ = ("job", "over", "sent_s", "side", "tokens", "transfer", "welcomes")

    def __init__(self, side: Side, tokens: int, sent_s: float, transfer: Transfer) -> None:
        assert side.breaker is not None
        self.side, self.tokens, self.sent_s, self.transfer = side, tokens, sent_s, transfer
        self.welcomes = side.breaker.welcomes
        self.job: Job | None = None
        self.over = False


class Probes:
    def __init__(self, world: World, cloud: InCloud) -> None:
        self._world, self._cloud, self._clock = world, cloud, world.clock
        self._timeout_s = world.scenario.agent.offload_timeout_ms / 1e3

    def send(self, side: Side) -> None:
        """Nothing while another is in the air, or where the cloud is not up."""
        breaker, now_s = side.breaker, self._clock.now_s
        assert breaker is not None
        if side.probe is not None or breaker.state != UP:
            return
        tokens = PROBE_TOKENS[side.probes % len(PROBE_TOKENS)]
        side.probes += 1
        nbytes = self._world.probe_nbytes(tokens)
        expected_ms = side.cloud_times.queue_ms
        expected_ms += self._world.probe_layers * side.cloud_times.layer_ms(tokens)
        beside = self._world.scenario.link.beside_nbytes
        probe = Probe(side, tokens, now_s, side.link.sent(nbytes - beside, expected_ms))
        side.probe = probe
        if side.usual_s is None or doubt_s(side.usual_s) > self._timeout_s:
            self._world.at(now_s + self._timeout_s, self._late, probe)
        else:  # one timer at a time: nearly all probes are answered before it
            self._cloud.handshakes.expects(side, self._doubt, probe)
        fault = self._cloud.faults.now("link")
        if fault is not None and fault.how == "refused":
            self.lose(probe, "unavailable")
            return
        self._world.beside(nbytes)
        self._cloud.link.carry(side.up, nbytes, now_s, self._there, probe)

    def finished(self, probe: Probe, job: Job) -> None:
        """An engine is done with it, now: its reply goes back."""
        nbytes, now_s = self._cloud.down_nbytes, self._clock.now_s
        job.reports_ms = job.queue_ms(now_s), 1e3 * job.ran_s
        self._world.beside(nbytes)
        leaves_s = now_s + self._cloud.hop_s
        self._cloud.link.carry(probe.side.down, nbytes, leaves_s, self._answered, probe, job)

    def lose(self, probe: Probe, reason: str, retry_s: float = 0.0) -> None:
        """It has failed: tell the breaker."""
        if probe.over:
            return
        side, breaker = probe.side, probe.side.breaker
        assert breaker is not None
        self._ends(probe)
        known = reason in ("timeout", "unavailable")
        (side.link.failed if known else side.link.dropped)(probe.transfer)
        if retry_s > 0:
            breaker.busy_for(retry_s, "")
        else:
            breaker.failed(reason, "", probe.welcomes)
        self._cloud.handshakes.asked(side)

    def reset(self, probe: Probe, told: bool) -> None:
        """Its connection is lost: it is known at once where the device is `told`, else by the time-out."""
        if probe.job is not None:
            probe.job.unwanted()
        probe.job = LOST
        if told:
            self.lose(probe, "unavailable")

    def given_up(self, side: Side) -> None:
        """The cloud was put aside: nobody waits for it."""
        probe = side.probe
        if probe is not None:
            self._ends(probe)
            side.link.failed(probe.transfer)
            self._cloud.link.tell_cancelled(side, probe.job)

    def _there(self, probe: Probe) -> None:
        self._world.at(self._clock.now_s + self._cloud.hop_s, self._at_cloud, probe)

    def _at_cloud(self, probe: Probe) -> None:
        fault, now_s = self._cloud.faults.now("cloud"), self._clock.now_s
        if probe.over or probe.job is LOST:
            return
        if fault is not None:
            if fault.how == "refused":
                back_s = now_s + self._cloud.rtt_s / 2
                self._world.at(back_s, self.lose, probe, "unavailable")
            return
        n, until_s = self._world.of.n_layers, probe.sent_s + self._timeout_s
        probe.job = Job(probe, n - self._world.probe_layers, n, probe.tokens, 1.0, until_s)
        try:
            self._world.farm.offer(probe.job, now_s)
        except Busy as busy:
            back_s = now_s + self._cloud.hop_s + self._cloud.rtt_s / 2
            self._world.at(back_s, self.lose, probe, str(busy), busy.retry_s)

    def _answered(self, probe: Probe, job: Job) -> None:
        if probe.over or probe.job is not job:
            return
        side, now_s = probe.side, self._clock.now_s
        self._ends(probe)
        self._world.pings.replied(side.number, now_s)
        self._cloud.handshakes.told(side, now_s - probe.sent_s)
        queue_ms, compute_ms = job.reports_ms
        side.cloud_times.ran(job.exit - job.entered, job.tokens, queue_ms, compute_ms)
        side.link.answered(probe.transfer, queue_ms + compute_ms)

    def _late(self, probe: Probe) -> None:
        if not probe.over:
            self._cloud.link.tell_cancelled(probe.side, probe.job)
            self.lose(probe, "timeout")

    def _doubt(self, probe: Probe) -> None:
        if not probe.over:
            self._world.at(probe.sent_s + self._timeout_s, self._late, probe)
            self._cloud.handshakes.doubted(probe.side)

    def _ends(self, probe: Probe) -> None:
        probe.over = True
        probe.side.probe = None
