"""The fast kernel: fixed plans with nothing that feeds back, whole chunks at a time, exactly.

Requests flow one way: device, uplink, engines, downlink. Each stage takes what is ready before the next
chunk's first request (nothing that comes later can be served before it) and keeps the rest. What would
feed back is watched for: an answer near its deadline or later than usual, more in the air
than it allows, an engine that refuses. Then `Feedback` is raised, and the event kernel (world.py) runs the
scenario instead.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from offramp_edge.greetings import doubt_s
from offramp_simulate.arrivals import Requests, phases, requests
from offramp_simulate.beside import Pings
from offramp_simulate.device_model import Fixed
from offramp_simulate.engine_model import Job
from offramp_simulate.engine_times import EngineTimes
from offramp_simulate.farm import Busy, Farm
from offramp_simulate.links import Direction, LinkProfile
from offramp_simulate.queues import ConstantCourse, Course, TraceCourse, fifo
from offramp_simulate.record import Record
from offramp_simulate.results import CLOUD, DEVICE, Answers, Tally
from offramp_simulate.scenario import Scenario

_FLIGHT = np.dtype(
    [
        ("now", "f8"), ("began", "f8"), ("sent", "f8"), ("device_s", "f8"), ("deviation", "f8"),
        ("device", "i4"), ("sample", "i4"), ("number", "i8"),
    ]
)  # fmt: skip
Flights = NDArray[np.void]


class Feedback(Exception):
    """This scenario is not one-way; the text says what feeds back."""


def feeds_back(scenario: Scenario, profile: LinkProfile, sends: bool) -> str:
    """What rules the fast kernel out beforehand; empty when nothing does. `sends`: the plan sends some
    samples."""
    if scenario.link.tcp:
        return "TCP"
    if scenario.arrivals.kind == "closed":
        return "closed arrivals"
    if sends and math.isfinite(scenario.agent.hedge_after):
        return "hedges"
    if scenario.faults:
        return "faults"
    if profile.jitter_ms:
        return "jitter of the link"
    return ""


class Flow:
    """One run. `run` adds every answer to the tally."""

    def __init__(
        self, scenario: Scenario, record: Record, profile: LinkProfile, plan: Fixed, tally: Tally
    ) -> None:
        self._scenario, self._record, self._plan, self._tally = scenario, record, plan, tally
        self.farm = Farm(EngineTimes(record, scenario.cloud), scenario.cloud, scenario.seed)
        count = scenario.devices.count
        self._free_D = np.full(count, -np.inf)
        self._up, self._down = _Line(scenario, profile, "up"), _Line(scenario, profile, "down")
        own_ms = record.header.gateway_ms
        gateway_ms = own_ms if scenario.cloud.gateway_ms < 0 else scenario.cloud.gateway_ms
        self._gateway_s = gateway_ms / 2e3 + self.farm.times.fixed_s / 2
        self._at_cloud: Flights = np.zeros(0, _FLIGHT)
        self._inside: Flights = np.zeros(0, _FLIGHT)
        self._number = 0
        self._warm_up = scenario.warm_up
        self._limits, self._pings = _Limits(scenario, plan), Pings()

    def run(self) -> None:
        """Raises Feedback, with the tally half full, when the run is not one-way."""
        for chunk in requests(self._scenario, self._record):
            self._take(chunk)
        self._tally.beside(self._pings.nbytes)
        self.farm.closed(self._tally.last_s)

    def _take(self, chunk: Requests) -> None:
        until = chunk.next_s
        flights = self._on_device(chunk)
        if self._plan.cut is None:
            return
        arrived = self._up.pass_on(flights, until, self._up_nbytes)
        arrived["now"] += self._gateway_s
        waiting = np.concatenate([self._at_cloud, arrived])
        waiting = waiting[np.argsort(waiting["now"], kind="stable")]
        ready = int(np.searchsorted(waiting["now"], until))
        self._at_cloud = waiting[ready:]
        done = self._in_cloud(waiting[:ready], until)
        done["now"] += self._gateway_s
        self._answered(self._down.pass_on(done, until, self._down_nbytes))
        self._limits.settle(until)

    def _on_device(self, chunk: Requests) -> Flights:
        """Those that leave are answered; the others, ready to be sent."""
        plan = self._plan
        order = np.argsort(chunk.device_N, kind="stable")
        device, sample = chunk.device_N[order], chunk.sample_N[order]
        span = plan.device_ms_N[sample] * chunk.device_deviation_N[order] / 1e3
        ends = fifo(device, chunk.when_N[order], span, self._free_D)
        skip = order < self._warm_up
        self._warm_up = max(0, self._warm_up - len(order))
        stays = plan.stays_N[sample]
        flights = np.zeros(len(order), _FLIGHT)
        flights["now"], flights["began"], flights["device"] = ends, chunk.when_N[order], device
        flights["sample"], flights["device_s"] = sample, span
        flights["deviation"] = chunk.engine_deviation_N[order]
        flights["began"][skip] = np.nan  # runs like the others, and is not counted
        here = flights[stays]
        self._limits.answered(here, False)
        self._add(here, DEVICE, plan.depth_N[here["sample"]], plan.right_N[here["sample"]])
        sent = flights[~stays]
        if plan.cut is not None:
            sent["sent"] = sent["now"]
            self._limits.sent(sent)
            encode_s = (
                plan.cut.encode_ms_N[sent["sample"]] * chunk.device_deviation_N[order][~stays]
            )
            sent["now"] += encode_s / 1e3
        return sent

    def _in_cloud(self, flights: Flights, until: float) -> Flights:
        """Offer them in order; all that batches begun before `until` finish, with `now` their end."""
        farm, plan = self.farm, self._plan
        finished: list[tuple[float, list[Job]]] = []
        flights["number"] = np.arange(self._number, self._number + len(flights))
        if len(flights):
            assert plan.cut is not None
            sample, depth = flights["sample"], plan.cut.depth
            columns = (
                flights["number"], flights["now"], plan.cut.exit_N[sample],
                plan.samples.tokens_N[sample], flights["deviation"],
            )  # fmt: skip
            try:
                for number, now, exit, tokens, deviation in zip(
                    *(column.tolist() for column in columns), strict=True
                ):
                    if farm.next_s <= now:
                        finished += farm.advance(now)
                    farm.offer(Job(number, depth, exit, tokens, deviation, math.inf), now)
            except Busy as busy:
                raise Feedback(f"the engines refuse ({busy})") from None
        self._number += len(flights)
        while farm.next_s < until and (until < math.inf or farm.held):
            finished += farm.advance(farm.next_s)
        inside = np.concatenate([self._inside, flights])  # by number, which rises
        numbers = np.array([job.key for _, batch in finished for job in batch], np.int64)
        places = np.searchsorted(inside["number"], numbers)
        done = inside[places]
        done["now"] = np.repeat([when for when, _ in finished], [len(b) for _, b in finished])
        stay = np.ones(len(inside), bool)
        stay[places] = False
        self._inside = inside[stay]
        return done

    def _answered(self, done: Flights) -> None:
        plan, sample = self._plan, done["sample"]
        assert plan.cut is not None
        self._limits.answered(done, True)
        for device, now_s in zip(done["device"].tolist(), done["now"].tolist(), strict=True):
            self._pings.replied(device, now_s)
        self._add(done, CLOUD, plan.cut.exit_N[sample], plan.cut.right_N[sample])

    def _add(
        self, flights: Flights, where: int, exits: NDArray[np.int64], right: NDArray[np.bool_]
    ) -> None:
        counted = ~np.isnan(flights["began"])
        flights, exits, right = flights[counted], exits[counted], right[counted]
        n, cut = len(flights), self._plan.cut
        sent = where == CLOUD and cut is not None
        up, down = np.zeros((2, n), np.int64)
        if sent:
            up, down = self._up_nbytes(flights), self._down_nbytes(flights)
        self._tally.add(
            Answers(
                flights["began"],
                flights["now"],
                flights["device"].astype(np.int64),
                np.full(n, where, np.int8),
                np.zeros(n, np.int8),
                exits,
                np.full(n, cut.depth if sent and cut else -1),
                right,
                up,
                down,
                flights["device_s"] * 1e3,
            )
        )

    def _up_nbytes(self, flights: Flights) -> NDArray[np.int64]:
        cut = self._plan.cut
        return np.zeros(len(flights), np.int64) if cut is None else cut.up_N[flights["sample"]]

    def _down_nbytes(self, flights: Flights) -> NDArray[np.int64]:
        cut = self._plan.cut
        return np.full(len(flights), 0 if cut is None else cut.down_nbytes)


class _Line:
    """One direction of the links: a queue for each device, or one for all."""

    def __init__(self, scenario: Scenario, profile: LinkProfile, direction: Direction) -> None:
        mbps = profile.uplink_mbps if direction == "up" else profile.downlink_mbps
        count = 1 if scenario.link.shared else scenario.devices.count
        self._phase_Q = np.zeros(count)
        self._course: Course = ConstantCourse(mbps)
        trace = profile.trace_of(direction)
        if profile.trace is not None and trace is not None:
            self._course = TraceCourse(trace)
            self._phase_Q = phases(scenario, profile.trace.period_s)
        self._shared, self._delay_s = scenario.link.shared, profile.rtt_ms / 2e3
        self._free_Q = np.full(count, -np.inf)
        self._held: Flights = np.zeros(0, _FLIGHT)

    def pass_on(self, flights: Flights, until: float, nbytes_of: object) -> Flights:
        """What enters before `until`, with `now` when it reaches the other end."""
        assert callable(nbytes_of)
        flights = np.concatenate([self._held, flights])
        now = flights["now"] < until
        self._held, flights = flights[~now], flights[now]
        queue = np.zeros(len(flights), np.int64)
        if not self._shared:
            queue = flights["device"].astype(np.int64)
        order = np.lexsort((flights["now"], queue))
        flights, queue = flights[order], queue[order]
        phase, course = self._phase_Q[queue], self._course
        spans = course.spans(nbytes_of(flights))
        ends = fifo(queue, course.passed(flights["now"] + phase), spans, self._free_Q)
        flights["now"] = np.maximum(course.when(ends) - phase, flights["now"]) + self._delay_s
        return flights


class _Limits:
    """The agent's limits: where one would have been reached, the run is not one-way."""

    def __init__(self, scenario: Scenario, plan: Fixed) -> None:
        agent = scenario.agent
        self._most, self._timeout_s = agent.max_in_flight, agent.offload_timeout_ms / 1e3
        # An agent stops before a layer that would be late: no answer may come so near to its deadline.
        layers_ms = float(plan.samples.layer_ms_NL.sum(axis=1).max())
        self._patience_s = (scenario.deadline_ms - agent.margin_ms - layers_ms) / 1e3
        self._shortest_s = math.inf
        self._air_D = np.zeros(scenario.devices.count, np.int64)
        self._device: list[NDArray[np.int64]] = []
        self._when: list[NDArray[np.float64]] = []
        self._step: list[NDArray[np.int64]] = []

    def sent(self, flights: Flights) -> None:
        self._note(flights["device"], flights["sent"], 1)

    def answered(self, flights: Flights, offloaded: bool) -> None:
        """Raises Feedback."""
        if not len(flights):
            return
        took_s = float(np.nanmax(flights["now"] - flights["began"], initial=0.0))
        if took_s > self._patience_s:
            raise Feedback(f"an answer takes {took_s:.3g} s, too near to its deadline")
        if offloaded:
            took_s_N = flights["now"] - flights["sent"]
            took_s, self._shortest_s = float(took_s_N.max()), min(self._shortest_s, took_s_N.min())
            if took_s >= self._timeout_s:
                raise Feedback(f"an offload takes {took_s:.3g} s, beyond offload_timeout_ms")
            # Usual is a mean of times before, so no less than the shortest.
            if took_s >= doubt_s(self._shortest_s):
                raise Feedback(f"an offload takes {took_s:.3g} s, so that the cloud may be greeted")
            self._note(flights["device"], flights["now"], -1)

    def settle(self, until: float) -> None:
        """Count what is in the air before `until`; all that happens before is known. Raises Feedback."""
        if not self._when:
            return
        device, when = np.concatenate(self._device), np.concatenate(self._when)
        step, now = np.concatenate(self._step), when < until
        self._device, self._when, self._step = [device[~now]], [when[~now]], [step[~now]]
        device, when, step = device[now], when[now], step[now]
        if not len(when):
            return
        order = np.lexsort((step, when, device))  # at the same moment, room is made first
        device, total = device[order], np.cumsum(step[order])
        first = np.append(True, device[1:] != device[:-1])
        starts = np.flatnonzero(first)
        before = (total - step[order])[starts]
        air = total - before[np.cumsum(first) - 1] + self._air_D[device]
        if air.max() > self._most:
            raise Feedback(f"more than {self._most} offloads of a device in the air")
        last = np.append(starts[1:], len(device)) - 1
        self._air_D[device[last]] = air[last]

    def _note(self, device: NDArray[np.int32], when: NDArray[np.float64], step: int) -> None:
        self._device.append(device.astype(np.int64))
        self._when.append(when.copy())
        self._step.append(np.full(len(when), step, np.int64))
