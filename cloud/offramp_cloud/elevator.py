"""The elevator: rows that wait at different depths share one way up.

It runs one layer at a time. From wherever it is it takes along whoever waits at that depth, lets out whoever
may leave, and goes on to the next depth with anybody there; at the top it starts again from the lowest. Who
came in below meanwhile is fetched first only where that is worth it (offramp_common.meeting). No clock is
waited for, and nobody leaves early for the sake of a batch.

A plain object for one thread, without asyncio: the engine runs it, and tests turn its clock.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from offramp_cloud.costs import LayerCost, Survival, meeting
from offramp_cloud.counters import Counters
from offramp_cloud.riders import Riders, Trip, boarded, fits, fitting, joined, total
from offramp_cloud.waiting import Load, Request
from offramp_common.activations import Rows
from offramp_common.runner import JoinedLayers, Knobs, Layers, Step, settle
from offramp_common.transport import Completion
from offramp_model.split_model import join_rows

_ALL_LEARNED = 64  # layers whose time teaches what a layer costs; afterwards
_LEARNED_EVERY = 4  # one in so many does


@dataclass(frozen=True, slots=True, eq=False)
class Done:
    """A request that is over: answered, or failed by an exception of its own."""

    request: Request
    outcome: Completion | Exception


class Elevator:
    """board(), then run() while not idle."""

    def __init__(
        self,
        layers: Layers[Tensor],
        load: Load,
        counters: Counters,
        *,
        exits: Sequence[int] | None = None,
        device: str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`exits`: depths whose predictions each request is told, None for none."""
        self._load, self._counters = load, counters
        self._n_layers = layers.n_layers  # asked for in every pass, and a model counts its modules
        self._steps = layers.steps if isinstance(layers, JoinedLayers) else partial(_each, layers)
        self._exits, self._device, self._clock = exits, device, clock
        self._floors: dict[int, list[Riders]] = {}
        self._at = 0
        self._riding: list[Trip] = []
        self._layers_run = 0
        self.cost = LayerCost()
        self._survival = Survival(self._n_layers)
        self.work_left = 0
        """Layers x tokens before it, as far as rows are expected to go."""
        self.boarded = 0
        """Layers x tokens of all that ever boarded, to the top."""

    @property
    def idle(self) -> bool:
        return not self._floors

    def board(self, request: Request) -> None:
        """Take a request in at its depth."""
        began_s = self._clock()
        depth = request.acts.depth
        exits = None if self._exits is None else [e for e in self._exits if e > depth]
        riders = boarded(Trip(request, exits), self._load, self._device)
        self._floors.setdefault(depth, []).extend(riders)
        work = request.work(self._n_layers)
        self.boarded += work
        self.work_left += work  # counted anew with every layer
        self._counters.overhead_s += self._clock() - began_s

    def run(self) -> list[Done]:
        """Run one layer for the rows of one depth, and say which requests are over with it."""
        now_s = self._clock()
        self._drop_unwanted(now_s)
        if self.idle:
            self._count_work()
            return []
        floor = self._next_floor(now_s)
        chosen = self._chosen(floor, now_s)
        trips = self._riding = _trips(chosen)
        parts = joined(chosen, self._load)
        for trip in trips:
            trip.request.started = True
        self._at = floor + 1
        began_s = self._clock()
        stepped, failed = self._step(parts)
        took_s = self._clock() - began_s
        self._learn([riders for riders, _ in stepped], took_s)
        done: list[Done] = []
        for trip, error in failed.items():
            trip.request.unwanted = True  # rows of it may wait on other floors
            self._counters.failed += 1
            done.append(Done(trip.request, error))
        for riders, step in stepped:
            self._settle(riders, step)
        ended_s = self._clock()
        for trip in trips:
            trip.ran_s += took_s
            if not trip.open_rows:
                answered = trip.completion(ended_s)
                self._counters.answered(trip.request.tokens, answered.exit_depth_B)
                done.append(Done(trip.request, answered))
        self._riding = []
        self._count_work()
        self._counters.overhead_s += self._clock() - now_s - took_s
        return done

    def abandon(self) -> list[Request]:
        """Drop everything, also what a layer was run for when run() raised; whose it was."""
        waiting = [riders for floor in self._floors.values() for riders in floor]
        trips = dict.fromkeys([*self._riding, *_trips(waiting)])
        self._floors.clear()
        self._riding = []
        self._count_work()
        return [trip.request for trip in trips]

    def _chosen(self, floor: int, now_s: float) -> list[Riders]:
        """Take those who run next from their floor: all, or who goes first where not all find room."""
        waiting = self._floors.pop(floor)
        if fits(*total(waiting), self._load):
            return waiting
        waiting.sort(key=lambda riders: self._rank(riders, now_s))
        chosen, rest = fitting(waiting, self._load)
        self._put(floor, rest)
        return chosen

    def _put(self, floor: int, waiting: list[Riders]) -> None:
        if waiting:
            self._floors[floor] = waiting
        else:
            self._floors.pop(floor, None)

    def _drop_unwanted(self, now_s: float) -> None:
        for floor, waiting in list(self._floors.items()):
            if all(trip.request.wanted(now_s) for riders in waiting for trip in riders.trips):
                continue
            left = [kept for kept in (riders.wanted(now_s) for riders in waiting) if kept]
            self._counters.dropped += total(waiting).rows - total(left).rows
            self._put(floor, left)

    def _next_floor(self, now_s: float) -> int:
        floors = sorted(self._floors)
        above = bisect_left(floors, self._at)
        if above in (0, len(floors)):
            return floors[0]
        return floors[0 if self._fetch(floors[:above], floors[above:], now_s) else above]

    def _fetch(self, below: list[int], above: list[int], now_s: float) -> bool:
        """Whether those below come first. Rank decides, then deadlines, then the sum of all waits."""
        mine, theirs = self._pressing(below, now_s), self._pressing(above, now_s)
        if mine.rank != theirs.rank:
            return mine.rank < theirs.rank
        if theirs.rank == -math.inf:
            return False
        meet = above[0]
        upper = total(self._floors[meet])
        lower = [(floor, total(self._floors[floor])) for floor in below]
        rows = upper.rows + sum(group.rows for _, group in lower)
        tokens = upper.tokens + sum(group.tokens for _, group in lower)
        if not fits(rows, tokens, self._load):
            return False  # they could not share a layer
        plan = meeting(self.cost, lower, upper, meet, self._survival.layers(meet))
        return plan.fetched(mine.slack_s, theirs.slack_s)

    def _pressing(self, floors: Sequence[int], now_s: float) -> _Pressing:
        waiting = (riders for floor in floors for riders in self._floors[floor])
        requests = [trip.request for riders in waiting for trip in riders.trips]
        age_s = self._load.max_age_s
        rank = min([request.rank(now_s, age_s)[0] for request in requests])
        deadlines = [r.deadline_s for r in requests if r.deadline_s is not None]
        return _Pressing(rank, min(deadlines, default=math.inf) - now_s)

    def _rank(self, riders: Riders, now_s: float) -> tuple[float, float, float]:
        return min(trip.request.rank(now_s, self._load.max_age_s) for trip in riders.trips)

    def _step(
        self, parts: Sequence[Riders]
    ) -> tuple[list[tuple[Riders, Step[Tensor]]], dict[Trip, Exception]]:
        """The parts after one layer; and the trips that have failed in it, whose rows are gone."""
        given = [(riders.rows, dict(riders.knobs)) for riders in parts]
        try:
            steps = self._steps(given)
            return list(zip(parts, steps, strict=True)), {}
        except Exception as error:  # noqa: BLE001 - becomes that request's own
            trips = _trips(parts)
            if len(trips) == 1:
                return [], dict.fromkeys(trips, error)
        # One of them may have poisoned the others: each goes up this floor alone.
        stepped: list[tuple[Riders, Step[Tensor]]] = []
        failed: dict[Trip, Exception] = {}
        for trip in trips:
            own = [riders.of(trip) for riders in parts if trip in riders.trips]
            more, broken = self._step(own)
            stepped, failed = stepped + more, failed | broken
        return stepped, failed

    def _settle(self, riders: Riders, step: Step[Tensor]) -> None:
        if self._exits is not None and step.look is not None:
            riders.note(step.look)
        settled = settle(riders.rows, step, self._n_layers)
        depth, left = riders.rows.depth, settled.gone.size
        self._survival.saw(depth, riders.count, left)
        if left and step.look is not None:
            riders.leave(settled.gone, step.look)
        if settled.stay.size:
            going = riders.going_on(settled.after, settled.stay)
            self._floors.setdefault(depth + 1, []).append(going)

    def _learn(self, ran: Sequence[Riders], took_s: float) -> None:
        group = total(ran)
        self._layers_run += 1
        if self._layers_run <= _ALL_LEARNED or self._layers_run % _LEARNED_EVERY == 0:
            self.cost.saw(group, took_s)
        self._counters.ran(group.rows, group.tokens, took_s)

    def _count_work(self) -> None:
        work = 0.0
        for floor, waiting in self._floors.items():
            work += self._survival.layers(floor) * total(waiting).tokens
        self.work_left = round(work)


class _Pressing(NamedTuple):
    """How the most pressing of some requests rank (lowest first), and the time until their first deadline,
    infinite where there is none."""

    rank: float
    slack_s: float


def _trips(waiting: Sequence[Riders]) -> list[Trip]:
    """Each once, in order."""
    return list(dict.fromkeys([trip for riders in waiting for trip in riders.trips]))


def _each(
    layers: Layers[Tensor], parts: Sequence[tuple[Rows[Tensor], Knobs]]
) -> list[Step[Tensor]]:
    """For layers that cannot be shared by batches."""
    return [layers.step(join_rows(rows), knobs) for rows, knobs in parts]
