"""Rows on their way up, and the requests that they belong to.

Axes: B rows, E exits, C answer width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offramp_cloud.costs import Group
from offramp_cloud.waiting import KnobKey, Load, Request
from offramp_common.activations import Activations
from offramp_common.exit_classes import ExitClasses
from offramp_common.runner import Leaving, Look
from offramp_common.transport import Completion
from offramp_model.split_model import join_tensors, to_torch


class Trip:
    """A request under way: what has come of its rows so far."""

    def __init__(self, request: Request, exits: Sequence[int] | None) -> None:
        """`exits`: whose predictions are recorded (where the device chooses exits), or None."""
        self.request = request
        rows = request.acts.batch_size
        self.open_rows = rows
        self.ran_s = 0.0  # while layers ran that its rows were in
        self.depth_B = np.zeros(rows, np.int64)
        self._confidence_B = np.zeros(rows, np.float32)
        self._answers: NDArray[np.float32] | None = None
        self._seen = None if exits is None else ExitClasses(rows, exits)

    def saw(self, depth: int, rows: NDArray[np.int64], answers: NDArray[np.float32]) -> None:
        """The exit at `depth` looked at these rows of the request."""
        if self._seen is not None:
            self._seen.add(depth, rows, answers)

    def leave(self, row: int, depth: int, answer: NDArray[np.float32], confidence: float) -> None:
        if self._answers is None:
            self._answers = np.zeros((len(self.depth_B), *answer.shape), np.float32)
        self._answers[row], self.depth_B[row] = answer, depth
        self._confidence_B[row] = confidence
        self.open_rows -= 1

    def completion(self, now_s: float) -> Completion:
        """Once all rows have left."""
        assert self._answers is not None
        assert self.open_rows == 0, f"{self.open_rows} rows have not left"
        return Completion(
            self.request.request_id,
            self._answers,
            self.depth_B,
            self._confidence_B,
            queue_ms=max(0.0, now_s - self.request.arrived_s - self.ran_s) * 1e3,
            compute_ms=self.ran_s * 1e3,
            exit_classes_BE=None if self._seen is None else self._seen.classes_BE,
        )


class Riders:
    """Rows of one depth and one operating point, that an exit head looks at together. Never changed.

    trip_B   whose row each is (an array of Trips);  row_B  which of the request's
    group    how many rows and tokens;  longest  tokens of the longest, padding included
    """

    __slots__ = ("acts", "group", "knobs", "longest", "row_B", "trip_B", "trips")

    def __init__(
        self,
        acts: Activations[Tensor],
        knobs: KnobKey,
        trip_B: NDArray[np.object_],
        row_B: NDArray[np.int64],
        group: Group | None = None,
    ) -> None:
        """`group`: where it is known already."""
        self.acts, self.knobs, self.trip_B, self.row_B = acts, knobs, trip_B, row_B
        self.trips: tuple[Trip, ...] = tuple(dict.fromkeys(trip_B.tolist()))
        self.group = group or Group(row_B.size, acts.n_tokens)
        self.longest = int(acts.hidden_BTD.shape[1])

    def take(self, rows: NDArray[np.int64]) -> Riders:
        return Riders(self.acts.take(rows), self.knobs, self.trip_B[rows], self.row_B[rows])

    def going_on(self, acts: Activations[Tensor], stay: NDArray[np.int64]) -> Riders:
        """Those that stay, `acts` a layer further up."""
        if acts.lengths_B is self.acts.lengths_B:  # all of them, and no token was dropped
            return Riders(acts, self.knobs, self.trip_B, self.row_B, self.group)
        return Riders(acts, self.knobs, self.trip_B[stay], self.row_B[stay])

    def wanted(self, now_s: float) -> Riders | None:
        """Without the rows that nobody waits for; None when none are left."""
        keep = [i for i, trip in enumerate(self.trip_B) if trip.request.wanted(now_s)]
        return self.take(np.array(keep, np.int64)) if keep else None

    def note(self, look: Look[Tensor]) -> None:
        """Tell the trips that want to know what the exit said of their rows."""
        answers = as_numpy(look.answer)
        for trip in self.trips:
            mine = np.flatnonzero(self.trip_B == trip)
            trip.saw(self.acts.depth + 1, self.row_B[mine], answers[mine])

    def leave(self, left: Leaving[Tensor]) -> None:
        answers, sure = as_numpy(left.answer), left.confidence_B.tolist()
        for place, (trip, row) in enumerate(
            zip(self.trip_B[left.rows], self.row_B[left.rows].tolist(), strict=True)
        ):
            trip.leave(row, left.depth, answers[place], sure[place])


def boarded(trip: Trip, load: Load, device: Any) -> list[Riders]:
    """A request's rows, in pieces within the load's bounds."""
    acts, knobs = trip.request.acts, trip.request.knobs
    rows = np.arange(acts.batch_size)
    trip_B = np.full(rows.size, trip, object)
    group = Group(rows.size, trip.request.tokens)
    whole = Riders(to_torch(acts, device), knobs, trip_B, rows, group)
    if fits(whole.group, load):
        return [whole]
    pieces: list[list[int]] = [[]]
    tokens = 0
    for row, length in enumerate(acts.lengths_B.tolist()):
        if pieces[-1] and not fits(Group(len(pieces[-1]) + 1, tokens + length), load):
            pieces.append([])
            tokens = 0
        pieces[-1].append(row)
        tokens += length
    return [whole.take(np.array(piece, np.int64)) for piece in pieces]


def fits(group: Group, load: Load) -> bool:
    return group.rows <= load.max_batch and group.tokens <= load.max_batch_tokens


def fitting(ordered: Iterable[Riders], load: Load) -> tuple[list[Riders], list[Riders]]:
    """(those that may share a layer, the rest): at least the first, within the load's bounds."""
    chosen: list[Riders] = []
    rest: list[Riders] = []
    total = Group(0, 0)
    for riders in ordered:
        if not chosen or fits(total.plus(riders.group), load):
            chosen.append(riders)
            total = total.plus(riders.group)
        else:
            rest.append(riders)
    return chosen, rest


def joined(chosen: Sequence[Riders], load: Load) -> list[Riders]:
    """The same rows in as few parts as operating points and the bound on padding allow."""
    if len(chosen) == 1:
        return list(chosen)
    parts: list[list[Riders]] = []
    total = Group(0, 0)
    for riders in sorted(chosen, key=lambda riders: (riders.knobs, riders.longest)):
        total = total.plus(riders.group)
        padded = total.rows * riders.longest
        same = parts and parts[-1][0].knobs == riders.knobs
        if not same or padded > load.max_padding * total.tokens:
            parts.append([])
            total = riders.group
        parts[-1].append(riders)
    return [_as_one(part) for part in parts]


def _as_one(part: Sequence[Riders]) -> Riders:
    if len(part) == 1:
        return part[0]
    acts = join_tensors([riders.acts for riders in part])
    trip_B = np.concatenate([riders.trip_B for riders in part])
    row_B = np.concatenate([riders.row_B for riders in part])
    group = Group(row_B.size, sum(riders.group.tokens for riders in part))
    return Riders(acts, part[0].knobs, trip_B, row_B, group)


def as_numpy(answer: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = answer.float().cpu().numpy()
    return array
