"""The same cell by the simulator's event kernel, answer by answer."""

from __future__ import annotations

import math
from dataclasses import replace
from heapq import heappop
from typing import Any

import numpy as np

from offramp_simulate import device_model
from offramp_simulate.links import Shaper
from offramp_simulate.record import Record
from offramp_simulate.results import REASONS, WHERE, Answers, Tally
from offramp_simulate.scenario import Scenario
from offramp_simulate.world import World
from offramp_simulate.world_lines import Line, PlainLine, Then
from validation.cells import SETTLE_S


class Kept(Tally):
    """A tally that keeps every answer, too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.answers: list[Answers] = []

    def add(self, a: Answers) -> None:
        self.answers.append(a)
        super().add(a)


class Counting(PlainLine):
    """A direction that remembers when its bytes come out, as `offramp link` counts them."""

    def __init__(self, world: World, shaper: Shaper) -> None:
        super().__init__(world, shaper)
        self._arrived: list[tuple[float, int]] = []

    def send(self, nbytes: int, now_s: float, then: Then, *args: Any) -> None:
        self._world.at(self._shaper.send(nbytes, now_s).arrives_s, self._out, nbytes, then, args)

    def until(self, when_s: float) -> int:
        """Bytes that are out by then."""
        return sum(nbytes for arrived_s, nbytes in self._arrived if arrived_s <= when_s)

    def _out(self, nbytes: int, then: Then, args: tuple[Any, ...]) -> None:
        self._arrived.append((self._world.clock.now_s, nbytes))
        then(*args)


class Counted(World):
    """Over lines that count."""

    lines: tuple[Counting, Counting]

    def _lines(self, number: int) -> tuple[Line, Line]:
        up, down = self._shapers(number)
        self.lines = Counting(self, up), Counting(self, down)
        return self.lines

    def settle(self, until_s: float) -> None:
        """What still happens until then; a run ends with its last answer."""
        while self._heap or self.farm.next_s < math.inf:
            when_s = self._heap[0][0] if self._heap else math.inf
            if min(when_s, self.farm.next_s) > until_s:
                return
            if self.farm.next_s <= when_s:
                self.clock.now_s = self.farm.next_s
                for _, batch in self.farm.advance(self.clock.now_s):
                    self.cloud.finished(batch)
            else:
                self.clock.now_s, _, call, args = heappop(self._heap)
                call(*args)


DRAWS = 10


def runs(scenario: Scenario, record: Record) -> list[dict[str, Any]]:
    """As many as there are draws of the pauses before a device greets a cloud that it has lost. The live
    device draws its own, so a cell without an outage has one answer and one with an outage a spread."""
    first = run(scenario, record)
    if not first["asides"]:
        return [first]
    return [first, *(run(scenario, record, draw) for draw in range(1, DRAWS))]


def run(scenario: Scenario, record: Record, draw: int = 0) -> dict[str, Any]:
    """Rows in order of asking, as `live.run` has them, without stages; `asides`: how often the cloud was put
    aside."""
    scenario = replace(scenario, warm_up=0)
    plan, profile = scenario.plans[0], scenario.profile()
    resolved = device_model.resolve(plan, scenario, record)
    kept = Kept(record.header.n_layers, scenario.costs, profile, scenario.deadline_ms)
    make = None
    if plan.planner != "fixed":
        from offramp_simulate.planners import maker

        make = maker(plan, scenario, record, resolved)
    world = Counted(scenario, record, profile, resolved, kept, make, plan.min_split)
    world.chance += draw
    world.run()
    one = kept.answers
    columns = {
        name: np.concatenate([getattr(a, name) for a in one])
        for name in (
            "began_s_N",
            "ended_s_N",
            "where_N",
            "reason_N",
            "exit_N",
            "cut_N",
            "up_N",
            "down_N",
        )
    }
    rows = []
    for at in np.argsort(columns["began_s_N"], kind="stable"):
        began_s, ended_s, where, reason, exit, cut, up, down = (
            columns[name][at].item() for name in columns
        )
        ms, n = 1e3 * (ended_s - began_s), record.header.n_layers
        row = [began_s, ms, WHERE[where], REASONS[reason], exit, n if cut < 0 else cut, up, down]
        rows.append(row)
    until_s = float(columns["ended_s_N"].max()) + SETTLE_S
    world.settle(until_s)
    up, down = (line.until(until_s) for line in world.lines)
    asides = sum(side.put_aside for side in world.sides())
    return {
        "rows": rows,
        "bytes_up": up,
        "bytes_down": down,
        "connection": world.pings.nbytes,
        "asides": asides,
    }
