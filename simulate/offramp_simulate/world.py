"""The event kernel: everything that the agent does, on a virtual clock, one event after another.

The order of events is (time, number): it depends on nothing but the scenario, the record and the seed. The
kernel keeps time, arrivals and the tally; what happens on a device is in world_device.py, on the network and
in the cloud in world_cloud.py. A plain heap rather than SimPy: see docs/decisions/0014-simulator.md.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from heapq import heappop, heappush
from typing import Any

import numpy as np

from offramp_edge.answers import Answer
from offramp_edge.device import LayerTimes
from offramp_edge.planning import Learns, Planner
from offramp_edge.requests import probe_depth
from offramp_simulate.arrivals import Draws, phases, requests
from offramp_simulate.beside import Pings
from offramp_simulate.device_model import Cut, Resolved, cut, samples
from offramp_simulate.engine_times import EngineTimes
from offramp_simulate.farm import Farm
from offramp_simulate.links import LinkProfile, Shaper, Shifted
from offramp_simulate.record import Record
from offramp_simulate.results import REASONS, WHERE, Answers, Tally
from offramp_simulate.scenario import Scenario
from offramp_simulate.world_cloud import InCloud
from offramp_simulate.world_device import OnDevice
from offramp_simulate.world_lines import Line, PlainLine, TcpLine
from offramp_simulate.world_parts import DONE, Flight, KernelClock, Side

_FLUSH = 8192
_DRAWN = 1024
_COLUMNS: tuple[type, ...] = (
    np.float64, np.float64, np.int64, np.int8, np.int8, np.int64, np.int64, np.bool_, np.int64,
    np.int64, np.float64,
)  # fmt: skip
MakePlanner = Callable[["World", Side], Planner]


class World:
    """One run of one plan. `run` adds every answer to the tally.

    planner_for   makes each device's planner; the plan's own cut where none is given
    """

    def __init__(
        self,
        scenario: Scenario,
        record: Record,
        profile: LinkProfile,
        plan: Resolved,
        tally: Tally,
        planner_for: MakePlanner | None = None,
        min_split: int = 0,
    ) -> None:
        self.scenario, self.record, self.plan, self.profile = scenario, record, plan, profile
        self.chance = scenario.seed  # of devices' pauses before they greet or send again
        self.clock = KernelClock()
        self.of = samples(record, scenario, plan)
        self.farm = Farm(EngineTimes(record, scenario.cloud), scenario.cloud, scenario.seed)
        self.planner_for, self._min_split = planner_for, min_split
        self.events, self.pings = 0, Pings()
        self._tally, self._serial = tally, itertools.count(1)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._rows: list[tuple[Any, ...]] = []
        self._cuts: dict[
            tuple[int, str], tuple[Cut, list[int], list[int], list[bool], list[float]]
        ] = {}
        self._sides: dict[int, Side] = {}
        self._phases = np.zeros(1)
        if profile.trace is not None:
            self._phases = phases(scenario, profile.trace.period_s)
        self._cell = self._shapers(0) if scenario.link.shared else None
        self._outstanding = self._taken = 0
        self._warm_up, self._closes = scenario.warm_up, scenario.arrivals.kind == "closed"
        self._drawn: Iterator[tuple[int, float, float]] = iter(())
        self._probe_nbytes: dict[int, int] = {}
        self.right = self.of.right_NE.tolist()
        self.columns = {depth: place for place, depth in enumerate(self.of.exits)}
        self.device = OnDevice(self)
        self.cloud = InCloud(self)

    def run(self) -> None:
        """To the last answer."""
        self.cloud.faults.schedule()
        arrivals = self._closed() if self._closes else self._open()
        with _without_collector():
            self._loop(arrivals)
        self._flush()
        self._tally.beside(self.pings.nbytes)
        self.farm.closed(self._tally.last_s)

    def _loop(self, arrivals: Iterator[Flight]) -> None:
        farm, heap, clock, arrived = self.farm, self._heap, self.clock, self.device.arrived
        coming = next(arrivals, None)
        coming_s = math.inf if coming is None else coming.began_s
        while coming is not None or self._outstanding:
            when, farm_s = heap[0][0] if heap else math.inf, farm.next_s
            if farm_s <= when and farm_s <= coming_s:
                clock.now_s = farm_s
                for _, batch in farm.advance(farm_s):
                    self.cloud.finished(batch)
            elif coming is not None and coming_s < when:
                clock.now_s = coming_s
                self._outstanding += 1
                arrived(coming)
                coming = next(arrivals, None)
                coming_s = math.inf if coming is None else coming.began_s
            else:
                clock.now_s, _, call, args = heappop(heap)
                call(*args)
                self.events += 1

    def at(self, when_s: float, call: Callable[..., None], *args: Any) -> None:
        """Call it then."""
        heappush(self._heap, (when_s, next(self._serial), call, args))

    def side(self, number: int) -> Side:
        """A device, made when it is first heard of."""
        side = self._sides.get(number)
        if side is None:
            up, down = self._lines(number)
            side = Side(number, up, down, self.scenario.agent.retry_share, self.clock)
            side.breaker = self.cloud.breaker_of(side)
            if self.cloud.estimates:
                side.link.connected(1e3 * (3 * self.cloud.rtt_s + 2 * self.cloud.hop_s))
            if self.planner_for is not None:
                side.times = LayerTimes(self.of.n_layers)
                side.planner = self.planner_for(self, side)
                side.learns = side.planner if isinstance(side.planner, Learns) else None
                self.device.warm_up(side)
            self._sides[number] = side
        return side

    def sides(self) -> list[Side]:
        return list(self._sides.values())

    def cut_at(
        self, depth: int, codec: str
    ) -> tuple[Cut, list[int], list[int], list[bool], list[float]]:
        """(what the record says of samples sent so, its bytes, exits, rights and encoding times as lists)."""
        codec = codec if depth else ""  # token ids have one of their own
        found = self._cuts.get((depth, codec))
        if found is None:
            made = cut(self.record, self.scenario, self.of, depth, codec or self.plan.codec)
            found = (
                made, made.up_N.tolist(), made.exit_N.tolist(), made.right_N.tolist(),
                made.encode_ms_N.tolist(),
            )  # fmt: skip
            self._cuts[depth, codec] = found
        return found

    def answer(
        self, flight: Flight, where: int, reason: str, exit: int, right: bool, down_nbytes: int = 0
    ) -> None:
        """It is answered, now; nothing else happens to it."""
        flight.stage = DONE
        self._outstanding -= 1
        now_s = self.clock.now_s
        if down_nbytes:
            self.pings.replied(flight.side.number, now_s)
        if flight.side.learns is not None:
            ms = 1e3 * (now_s - flight.began_s)
            split = self.of.n_layers if flight.cut < 0 else flight.cut
            said = Answer(
                id="", text="", label="", probability=None, exit_depth=exit, where=WHERE[where],
                reason=reason, split=split, complete=True, confidence=0.0, ms=ms,
            )  # fmt: skip
            flight.side.learns.answered(said)
        if flight.number >= self._warm_up:
            self._rows.append(
                (
                    flight.began_s, now_s, flight.side.number, where, _PLACES.get(reason, 0), exit,
                    flight.cut, right, flight.up_nbytes, down_nbytes, flight.device_ms,
                )
            )  # fmt: skip
            if len(self._rows) >= _FLUSH:
                self._flush()
        if self._closes:
            self._next_of(flight.side.number, now_s + self.scenario.arrivals.think_s)

    def wasted(self, ms: float) -> None:
        """The device computed so long for a sample that is answered already."""
        self._tally.wasted(ms)

    def probe_nbytes(self, tokens: int) -> int:
        """Of a probe's request, hidden states of so many tokens: on a line through the samples' own."""
        if tokens not in self._probe_nbytes:
            up_N, tokens_N = self.cut_at(self._probe_depth, "")[0].up_N, self.of.tokens_N
            slope, start = 0.0, float(up_N[0])
            if len(set(tokens_N.tolist())) > 1:
                slope, start = np.polyfit(tokens_N, up_N, 1).tolist()
            self._probe_nbytes[tokens] = max(round(start + slope * tokens), 1)
        return self._probe_nbytes[tokens]

    @cached_property
    def probe_layers(self) -> int:
        """That a probe has the cloud run."""
        return self.of.n_layers - self._probe_depth

    @cached_property
    def _probe_depth(self) -> int:
        return probe_depth(range(self._min_split, self.of.n_layers))

    def beside(self, nbytes: int) -> None:
        """Bytes that belong to no answer."""
        self._tally.beside(nbytes)

    def _open(self) -> Iterator[Flight]:
        number, agent, sides = 0, self.scenario.agent, self._sides
        patience_s = (self.scenario.deadline_ms - agent.margin_ms) / 1e3
        for chunk in requests(self.scenario, self.record):
            columns = (
                chunk.when_N, chunk.device_N, chunk.sample_N, chunk.device_deviation_N,
                chunk.engine_deviation_N,
            )  # fmt: skip
            for when, device, sample, one, other in zip(
                *(c.tolist() for c in columns), strict=True
            ):
                side = sides.get(device) or self.side(device)
                flight = Flight(side, number, when, sample, (one, other))
                flight.until_s = when + patience_s
                yield flight
                number += 1

    def _closed(self) -> Iterator[Flight]:
        """The first question of each device; the others come from `answer`."""
        self._draws = Draws(self.scenario, self.record)
        gap_s = 1e-3  # so that devices do not ask in step for ever
        for number in range(min(self.scenario.devices.count, self.scenario.requests)):
            yield self._drawn_flight(number, number * gap_s)

    def _next_of(self, device: int, when_s: float) -> None:
        if self._taken < self.scenario.requests:
            flight = self._drawn_flight(device, when_s)
            self._outstanding += 1
            self.at(when_s, self.device.arrived, flight)

    def _drawn_flight(self, device: int, when_s: float) -> Flight:
        drawn = next(self._drawn, None)
        if drawn is None:
            one, two, three = (column.tolist() for column in self._draws.take(_DRAWN))
            self._drawn = iter(list(zip(one, two, three, strict=True)))
            drawn = next(self._drawn)
        sample, one, other = drawn
        flight = Flight(self.side(device), self._taken, when_s, sample, (one, other))
        agent = self.scenario.agent
        flight.until_s = when_s + (self.scenario.deadline_ms - agent.margin_ms) / 1e3
        self._taken += 1
        return flight

    def _lines(self, number: int) -> tuple[Line, Line]:
        """A device's uplink and downlink; with TCP a connection of its own, over the cell's shapers too."""
        up, down = self._cell or self._shapers(number)
        if self.scenario.link.tcp:
            return TcpLine(self, up, "up", number), TcpLine(self, down, "down", number)
        return PlainLine(self, up), PlainLine(self, down)

    def _shapers(self, number: int) -> tuple[Shaper, Shaper]:
        """The emulator's own, with the trace from the device's own place."""
        up, down = self.profile.shaper("up"), self.profile.shaper("down")
        phase_s = float(self._phases[number % len(self._phases)])
        if phase_s:
            up.rate, down.rate = Shifted(up.rate, phase_s), Shifted(down.rate, phase_s)
        return up, down

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays: list[Any] = [
                np.array(column, kind) for column, kind in zip(columns, _COLUMNS, strict=True)
            ]
            self._tally.add(Answers(*arrays))
            self._rows = []


@contextmanager
def _without_collector() -> Iterator[None]:
    """Millions of small objects; the one ring, of a flight and its job, is opened when it is over."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_PLACES = {reason: place for place, reason in enumerate(REASONS)}
assert WHERE[0] == "device"
