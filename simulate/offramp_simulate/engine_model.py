"""One engine of the cloud, as the live elevator works, with recorded times.

Whoever waits at a depth is taken along, one layer runs, whoever may leave does, and it goes on with the next
depth above where anybody is; those below are fetched first only where the sum of all waits falls or a
deadline is met by it (offramp_common.meeting). The way up is offramp_cloud.elevator's, written again over
single rows because the simulator must not import the cloud; tests/simulate/test_engine_model.py runs both
side by side. What the live engine learns of its layers' times, this one knows from the record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from offramp_common.meeting import Meeting
from offramp_simulate.engine_times import EngineTimes, Survival
from offramp_simulate.scenario_parts import Cloud

Group = tuple[int, int]
"""Rows taken together, and the tokens of all of them."""


class Job:
    """One row in the cloud, at `depth`, that leaves at `exit`. Nobody wants it after `wanted_s`; `key` is the
    caller's. `ran_s`: while layers ran that it was in; `reports_ms`: (waited, computed), once it is over."""

    __slots__ = (
        "arrived_s", "depth", "deviation", "entered", "exit", "key", "ran_s", "reports_ms", "tokens",
        "wanted_s", "work",
    )  # fmt: skip

    def __init__(
        self, key: Any, depth: int, exit: int, tokens: int, deviation: float, wanted_s: float
    ) -> None:
        self.key, self.depth, self.exit, self.tokens = key, depth, exit, tokens
        self.deviation, self.wanted_s, self.entered = deviation, wanted_s, depth
        self.arrived_s = self.ran_s = self.work = 0.0
        self.reports_ms = (0.0, 0.0)

    def unwanted(self) -> None:
        """Nobody waits for it any more."""
        self.wanted_s = -math.inf

    def queue_ms(self, now_s: float) -> float:
        """Of its time in the house, what no layer ran for it; it is over now."""
        return 1e3 * max(0.0, now_s - self.arrived_s - self.ran_s)

    def rank(self, now_s: float, max_age_s: float) -> tuple[float, float]:
        """Lowest goes first: whoever is old, then by deadline; the oldest of equals."""
        if now_s - self.arrived_s >= max_age_s:
            return (-math.inf, self.arrived_s)
        return (self.wanted_s, self.arrived_s)


Riders = list[Job]
"""Rows that have run a layer together, and stay together: an exit head looks at them at once."""


class Engine:
    """One replica. Its owner calls `run` when it is idle or `ends_s` has come.

    work   layers x tokens that it holds, as far as rows are expected to go
    """

    def __init__(self, number: int, times: EngineTimes, cloud: Cloud, starts_s: float) -> None:
        self.number, self._times, self._cloud, self.starts_s = number, times, cloud, starts_s
        self.alive, self.turn = True, 0
        self.held, self.work, self.busy_s = 0, 0.0, 0.0
        self.layers = self.rows = self.done_work = 0
        self.ends_s = math.inf
        self.survival = Survival(times.n_layers)
        self._floors: dict[int, list[Riders]] = {}
        self._running: list[Riders] = []
        self._at = 0
        self._express_s = 0.0  # of each layer, where one row runs several in one go; 0: one layer
        self._began_s = 0.0
        self._ended_s = -math.inf  # when its latest layer ended

    @property
    def running(self) -> bool:
        return bool(self._running)

    def board(self, job: Job, now_s: float) -> None:
        """It waits at its depth. Where a single row is on its way through several layers, it is stopped
        behind the one that is running."""
        self._floors.setdefault(job.depth, []).append([job])
        self.held += 1
        job.arrived_s, job.work = now_s, job.tokens * self.survival.layers[job.depth]
        self.work += job.work
        if self._express_s:
            ((rider,),) = self._running
            ran = max(math.ceil((now_s - self._began_s) / self._express_s - 1e-9), 1)
            ran = min(ran, rider.exit - rider.depth)
            self._count(rider, ran - 1, self._express_s * (ran - 1))
            self._began_s += self._express_s * (ran - 1)
            self._at = rider.depth + 1
            self.ends_s, self._express_s = self._began_s + self._express_s, 0.0
            self.turn += 1

    def run(self, now_s: float) -> list[Job]:
        """End what ran, say who left, and begin the next layer; `ends_s` is infinite when nobody is there."""
        left = self._end(now_s) if self._running else []
        self.turn += 1
        if self.held > 1:
            self._drop_unwanted(now_s)
        if self.held == 1:
            self._lone(now_s)
            return left
        if not self._floors:
            self.ends_s = math.inf
            return left
        floor = self._next_floor(now_s)
        self._running = parts = self._joined(self._chosen(floor, now_s))
        self._at, self._began_s = floor + 1, max(now_s, self.starts_s)
        layer_s = self._times.layer_s(*_total(parts)) * parts[0][0].deviation
        self.ends_s = self._began_s + layer_s
        return left

    def _lone(self, now_s: float) -> None:
        """One row, and nobody else: through all its layers in one go."""
        floor, ((job,),) = self._floors.popitem()
        if not now_s < job.wanted_s:
            self._gone(job)
            self.ends_s = math.inf
            return
        self._running, self._at = [[job]], floor + 1
        wakes_s, layer_s = self._times.alone(now_s - self._ended_s, job.tokens)
        self._began_s = max(now_s, self.starts_s) + wakes_s
        self._express_s = layer_s * job.deviation
        self.ends_s = self._began_s + self._express_s * (job.exit - floor)

    def everybody(self) -> list[Job]:
        """All whom it holds."""
        groups = [*self._running, *(group for floor in self._floors.values() for group in floor)]
        return [job for group in groups for job in group]

    def _end(self, now_s: float) -> list[Job]:
        parts, self._running, self._ended_s = self._running, [], now_s
        if self._express_s:
            ((rider,),) = parts
            layers = rider.exit - rider.depth
            self._count(rider, layers - 1, self._express_s * (layers - 1))
            self._began_s += self._express_s * (layers - 1)
            self._express_s = 0.0
        took_s = now_s - self._began_s
        self.busy_s += took_s
        self.layers += 1
        rows = 0
        every: list[Job] = []
        for part in parts:
            for job in part:
                job.depth += 1
                job.ran_s += took_s
                self.done_work += job.tokens
            left = [job for job in part if job.depth >= job.exit]
            self.survival.saw(part[0].depth - 1, len(part), len(left))
            if len(left) < len(part):
                stay = [job for job in part if job.depth < job.exit]
                self._floors.setdefault(stay[0].depth, []).append(stay)
            rows, every = rows + len(part), every + left
        for job in every:
            self._gone(job)
        self.rows += rows
        return every

    def _count(self, rider: Job, layers: int, took_s: float) -> None:
        """A single row has run so many layers in one go, and left behind none of them."""
        self.survival.passed(rider.depth, rider.depth + layers)
        rider.depth += layers
        rider.ran_s += took_s
        self.busy_s += took_s
        self.layers += layers
        self.rows += layers
        self.done_work += layers * rider.tokens

    def _gone(self, job: Job) -> None:
        self.held -= 1
        self.work -= job.work

    def _drop_unwanted(self, now_s: float) -> None:
        for floor, waiting in list(self._floors.items()):
            if all(now_s < job.wanted_s for group in waiting for job in group):
                continue
            for job in (job for group in waiting for job in group if not now_s < job.wanted_s):
                self._gone(job)
            left = [[job for job in group if now_s < job.wanted_s] for group in waiting]
            if kept := [group for group in left if group]:
                self._floors[floor] = kept
            else:
                del self._floors[floor]

    def _chosen(self, floor: int, now_s: float) -> list[Riders]:
        waiting, cloud = self._floors.pop(floor), self._cloud
        rows, tokens = _total(waiting)
        if rows <= cloud.max_batch and tokens <= cloud.max_batch_tokens:
            return waiting
        waiting.sort(key=lambda group: min(job.rank(now_s, cloud.max_age_s) for job in group))
        chosen: list[Riders] = []
        rest: list[Riders] = []
        for group in waiting:
            rows, tokens = _total([*chosen, group])
            if not chosen or (rows <= cloud.max_batch and tokens <= cloud.max_batch_tokens):
                chosen.append(group)
            else:
                rest.append(group)
        if rest:
            self._floors[floor] = rest
        return chosen

    def _joined(self, chosen: list[Riders]) -> list[Riders]:
        """The same rows in as few groups as the bound on padding allows."""
        if len(chosen) == 1:
            return chosen
        parts: list[Riders] = []
        for group in sorted(chosen, key=_longest):
            if parts:
                rows, tokens = _total([parts[-1], group])
                if rows * _longest(group) <= self._cloud.max_padding * tokens:
                    parts[-1] = parts[-1] + group
                    continue
            parts.append(group)
        return parts

    def _next_floor(self, now_s: float) -> int:
        if len(self._floors) == 1:
            return next(iter(self._floors))
        above = sorted(floor for floor in self._floors if floor >= self._at)
        below = sorted(floor for floor in self._floors if floor < self._at)
        if not above or not below:
            return (above or below)[0]
        return below[0] if self._fetch(below, above, now_s) else above[0]

    def _fetch(self, below: list[int], above: list[int], now_s: float) -> bool:
        """Whether those below come first: age decides, then deadlines, then the sum of all waits."""
        age_s, floors = self._cloud.max_age_s, self._floors
        mine = [job for floor in below for group in floors[floor] for job in group]
        theirs = [job for floor in above for group in floors[floor] for job in group]
        old_below, old_above = (
            any(now_s - job.arrived_s >= age_s for job in jobs) for jobs in (mine, theirs)
        )
        if old_above:
            return False
        if old_below:
            return True
        meet = above[0]
        upper, climb_s, lower = _total(floors[meet]), 0.0, (0, 0)
        for floor, until in zip(below, [*below[1:], meet], strict=True):
            rows, tokens = _total(floors[floor])
            lower = (lower[0] + rows, lower[1] + tokens)
            climb_s += (until - floor) * self._expected_s(lower)
        both = (lower[0] + upper[0], lower[1] + upper[1])
        if both[0] > self._cloud.max_batch or both[1] > self._cloud.max_batch_tokens:
            return False
        shared = self.survival.layers[meet]
        below_s, upper_s, together_s = (shared * self._expected_s(g) for g in (lower, upper, both))
        slack_below_s, slack_upper_s = (
            min(job.wanted_s for job in jobs) - now_s for jobs in (mine, theirs)
        )
        plan = Meeting(lower[0], upper[0], climb_s, below_s, upper_s, together_s)
        return plan.fetched(slack_below_s, slack_upper_s)

    def _expected_s(self, group: Group) -> float:
        rows = min(group[0], self._cloud.max_batch)
        return self._times.layer_s(rows, round(group[1] * rows / group[0]))


def _total(groups: Sequence[Riders]) -> Group:
    rows = tokens = 0
    for group in groups:
        rows += len(group)
        for job in group:
            tokens += job.tokens
    return rows, tokens


def _longest(group: Riders) -> int:
    return max(job.tokens for job in group)
