"""The event kernel: everything that the agent does, on a virtual clock, one event after another.

The order of events is (time, number): it depends on nothing but the scenario, the record and the seed. The
kernel keeps time, arrivals and the tally; what happens on a device is in world_device.py, on the network and
in the cloud in world_cloud.py. A plain heap rather than SimPy: see docs/decisions/0014-simulator.md.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from offramp_edge.answers import Answer
from offramp_edge.device import LayerTimes
from offramp_edge.planning import Learns, Planner
from offramp_simulate.arrivals import Draws, phases, requests
from offramp_simulate.device_model import Cut, Resolved, cut, samples
from offramp_simulate.engine_times import EngineTimes
from offramp_simulate.farm import Farm
from offramp_simulate.links import LinkProfile, Rate, Shaper
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
        self.clock = KernelClock()
        self.of = samples(record, scenario, plan)
        self.farm = Farm(EngineTimes(record, scenario.cloud), scenario.cloud, scenario.seed)
        self.planner_for, self._probe_depth = planner_for, max(1, min_split)
        self.events = 0
        self._tally, self._serial = tally, 0
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
        self._drawn: Iterator[tuple[int, float, float]] = iter(())
        self._probe_nbytes: dict[int, int] = {}
        self.right = self.of.right_NE.tolist()
        self.columns = {depth: place for place, depth in enumerate(self.of.exits)}
        self.device = OnDevice(self)
        self.cloud = InCloud(self)

    def run(self) -> None:
        """To the last answer."""
        self.cloud.faults.schedule()
        arrivals = self._closed() if self.scenario.arrivals.kind == "closed" else self._open()
        coming = next(arrivals, None)
        farm, heap, clock = self.farm, self._heap, self.clock
        while coming is not None or self._outstanding:
            when = heap[0][0] if heap else math.inf
            if farm.next_s <= when and (coming is None or farm.next_s <= coming.began_s):
                clock.now_s = farm.next_s
                for _, batch in farm.advance(farm.next_s):
                    self.cloud.finished(batch)
            elif coming is not None and coming.began_s < when:
                clock.now_s = coming.began_s
                self._outstanding += 1
                self.device.arrived(coming)
                coming = next(arrivals, None)
            else:
                clock.now_s, _, call, args = heapq.heappop(heap)
                call(*args)
                self.events += 1
        self._flush()
        farm.closed(self._tally.last_s)

    def at(self, when_s: float, call: Callable[..., None], *args: Any) -> None:
        """Call it then."""
        self._serial += 1
        heapq.heappush(self._heap, (when_s, self._serial, call, args))

    def side(self, number: int) -> Side:
        """A device, made when it is first heard of."""
        side = self._sides.get(number)
        if side is None:
            up, down = self._lines(number)
            side = Side(number, up, down, self.scenario.agent.retry_share, self.clock)
            side.breaker = self.cloud.breaker_of(side)
            if self.planner_for is not None:
                side.times = LayerTimes(self.of.n_layers)
                side.link.connected(1e3 * (3 * self.cloud.rtt_s + 2 * self.cloud.hop_s))
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
        if flight.side.learns is not None:
            ms = 1e3 * (now_s - flight.began_s)
            split = self.of.n_layers if flight.cut < 0 else flight.cut
            said = Answer(
                id="", text="", label="", probability=None, exit_depth=exit, where=WHERE[where],
                reason=reason, split=split, complete=True, confidence=0.0, ms=ms,
            )  # fmt: skip
            flight.side.learns.answered(said)
        if flight.number >= self.scenario.warm_up:
            self._rows.append(
                (
                    flight.began_s, now_s, flight.side.number, where, _PLACES.get(reason, 0), exit,
                    flight.cut, right, flight.up_nbytes, down_nbytes, flight.device_ms,
                )
            )  # fmt: skip
            if len(self._rows) >= _FLUSH:
                self._flush()
        if self.scenario.arrivals.kind == "closed":
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

    @property
    def probe_layers(self) -> int:
        """That a probe has the cloud run."""
        return self.of.n_layers - self._probe_depth

    def probed(self, nbytes: int) -> None:
        """Bytes that no answer was asked for."""
        self._tally.probed(nbytes)

    def _open(self) -> Iterator[Flight]:
        number, agent = 0, self.scenario.agent
        patience_s = (self.scenario.deadline_ms - agent.margin_ms) / 1e3
        for chunk in requests(self.scenario, self.record):
            columns = (
                chunk.when_N, chunk.device_N, chunk.sample_N, chunk.device_deviation_N,
                chunk.engine_deviation_N,
            )  # fmt: skip
            for when, device, sample, one, other in zip(
                *(c.tolist() for c in columns), strict=True
            ):
                flight = Flight(self.side(device), number, when, sample, (one, other))
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
            up.rate, down.rate = _Shifted(up.rate, phase_s), _Shifted(down.rate, phase_s)
        return up, down

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays: list[Any] = [
                np.array(column, kind) for column, kind in zip(columns, _COLUMNS, strict=True)
            ]
            self._tally.add(Answers(*arrays))
            self._rows = []


class _Shifted:
    """A rate whose time runs ahead."""

    def __init__(self, rate: Rate, by_s: float) -> None:
        self._rate, self._by_s = rate, by_s

    @property
    def mean_mbps(self) -> float:
        return self._rate.mean_mbps

    @property
    def peak_mbps(self) -> float:
        return self._rate.peak_mbps

    def finish_s(self, start_s: float, nbytes: int) -> float:
        return self._rate.finish_s(start_s + self._by_s, nbytes) - self._by_s

    def scaled(self, factor: float) -> Rate:
        return _Shifted(self._rate.scaled(factor), self._by_s)


_PLACES = {reason: place for place, reason in enumerate(REASONS)}
assert WHERE[0] == "device"
