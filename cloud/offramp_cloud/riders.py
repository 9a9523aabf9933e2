"""Rows on their way up, and the requests that they belong to.

Axes: B rows, E exits, C answer width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offramp_cloud.costs import Group
from offramp_cloud.waiting import KnobKey, Load, Request
from offramp_common.activations import Activations, Rows
from offramp_common.exit_classes import ExitClasses
from offramp_common.runner import Look
from offramp_common.transport import Completion
from offramp_model.split_model import to_torch


class Trip:
    """A request under way: what has come of its rows so far."""

    def __init__(self, request: Request, exits: Sequence[int] | None) -> None:
        """`exits`: whose predictions are recorded (where the device chooses exits), or None."""
        self.request = request
        rows = request.acts.batch_size
        self.open_rows = rows
        self.ran_s = 0.0  # while layers ran that its rows were in
        self._left: list[tuple[int, int, float, NDArray[np.float32]]] = []
        """Row, depth, confidence and answer (1, C)."""
        self._seen = None if exits is None else ExitClasses(rows, exits)

    def saw(self, depth: int, rows: NDArray[np.int64], answers: NDArray[np.float32]) -> None:
        """The exit at `depth` looked at these rows of the request."""
        if self._seen is not None:
            self._seen.add(depth, rows, answers)

    def leave(self, row: int, depth: int, answer: NDArray[np.float32], confidence: float) -> None:
        self._left.append((row, depth, confidence, answer))
        self.open_rows -= 1

    def completion(self, now_s: float) -> Completion:
        """Once all rows have left."""
        assert self.open_rows == 0, f"{self.open_rows} rows have not left"
        self._left.sort(key=_row)
        _, depths, sure, answers = zip(*self._left, strict=True)
        return Completion(
            self.request.request_id,
            np.concatenate(answers),
            np.array(depths, np.int64),
            np.array(sure, np.float32),
            queue_ms=max(0.0, now_s - self.request.arrived_s - self.ran_s) * 1e3,
            compute_ms=self.ran_s * 1e3,
            exit_classes_BE=None if self._seen is None else self._seen.classes_BE,
        )


_row = itemgetter(0)

Owner = tuple[Trip, int]
"""Whose row it is, and which of the request's."""


class Riders:
    """Rows of one depth and one operating point, that an exit head looks at together. Never changed.

    rows     their activations, where they are: copied together by the next layer
    owners   whose row each is, and which of the request's;  lengths  tokens of each
    count    how many rows;  tokens  of all of them;  longest  of the longest

    Lists, because for a handful of rows they take a fraction of the time that arrays do.
    """

    __slots__ = ("count", "knobs", "lengths", "longest", "owners", "rows", "tokens", "trips")

    def __init__(
        self, rows: Rows[Tensor], knobs: KnobKey, owners: list[Owner], lengths: list[int]
    ) -> None:
        self.rows, self.knobs, self.owners, self.lengths = rows, knobs, owners, lengths
        self.trips: tuple[Trip, ...] = tuple(dict.fromkeys([trip for trip, _ in owners]))
        self.count, self.tokens, self.longest = len(lengths), sum(lengths), max(lengths)

    def take(self, places: list[int]) -> Riders:
        """Those at the given places, which ascend."""
        return self._with(self.rows.take(np.array(places, np.int64)), places, self.lengths)

    def of(self, trip: Trip) -> Riders:
        """One trip's own."""
        return self.take(self._places(trip))

    def going_on(self, after: Activations[Tensor], stay: NDArray[np.int64]) -> Riders:
        """Those that stay, of all of them a layer further."""
        return self._with(Rows(((after, stay),)), stay.tolist(), after.lengths_B.tolist())

    def wanted(self, now_s: float) -> Riders | None:
        """Without the rows that nobody waits for; None when none are left."""
        keep = [i for i, (trip, _) in enumerate(self.owners) if trip.request.wanted(now_s)]
        return self.take(keep) if keep else None

    def note(self, look: Look[Tensor]) -> None:
        """Tell the trips that want to know what the exit said of their rows."""
        answers = as_numpy(look.answer)
        for trip in self.trips:
            mine = self._places(trip)
            rows = np.array([self.owners[i][1] for i in mine], np.int64)
            trip.saw(self.rows.depth + 1, rows, answers[mine])

    def leave(self, gone: NDArray[np.int64], look: Look[Tensor]) -> None:
        answers, sure = as_numpy(look.answer), look.confidence_B.tolist()
        depth = self.rows.depth + 1
        for place in gone.tolist():
            trip, row = self.owners[place]
            trip.leave(row, depth, answers[place : place + 1], sure[place])

    def _places(self, trip: Trip) -> list[int]:
        return [i for i, (owner, _) in enumerate(self.owners) if owner is trip]

    def _with(self, rows: Rows[Tensor], places: list[int], lengths: list[int]) -> Riders:
        owners = [self.owners[i] for i in places]
        return Riders(rows, self.knobs, owners, [lengths[i] for i in places])


def boarded(trip: Trip, load: Load, device: Any) -> list[Riders]:
    """A request's rows, in pieces within the load's bounds."""
    acts = to_torch(trip.request.acts, device)
    lengths: list[int] = acts.lengths_B.tolist()
    owners = [(trip, row) for row in range(len(lengths))]
    whole = Riders(Rows.of(acts), trip.request.knobs, owners, lengths)
    if fits(whole.count, whole.tokens, load):
        return [whole]
    pieces: list[list[int]] = [[]]
    tokens = 0
    for row, length in enumerate(lengths):
        if pieces[-1] and not fits(len(pieces[-1]) + 1, tokens + length, load):
            pieces.append([])
            tokens = 0
        pieces[-1].append(row)
        tokens += length
    return [whole.take(piece) for piece in pieces]


def total(waiting: Iterable[Riders]) -> Group:
    """Of all of them."""
    count = tokens = 0
    for riders in waiting:
        count += riders.count
        tokens += riders.tokens
    return Group(count, tokens)


def fits(rows: int, tokens: int, load: Load) -> bool:
    return rows <= load.max_batch and tokens <= load.max_batch_tokens


def fitting(ordered: Iterable[Riders], load: Load) -> tuple[list[Riders], list[Riders]]:
    """(those that may share a layer, the rest): at least the first, within the load's bounds."""
    chosen: list[Riders] = []
    rest: list[Riders] = []
    rows = tokens = 0
    for riders in ordered:
        if not chosen or fits(rows + riders.count, tokens + riders.tokens, load):
            chosen.append(riders)
            rows, tokens = rows + riders.count, tokens + riders.tokens
        else:
            rest.append(riders)
    return chosen, rest


def joined(chosen: Sequence[Riders], load: Load) -> list[Riders]:
    """The same rows in as few parts as operating points and the bound on padding allow."""
    if _one_part(chosen, load):
        return [_as_one(chosen)]
    parts: list[list[Riders]] = []
    for riders in sorted(chosen, key=lambda riders: (riders.knobs, riders.longest)):
        if not (parts and _one_part([*parts[-1], riders], load)):
            parts.append([])
        parts[-1].append(riders)
    return [_as_one(part) for part in parts]


def _one_part(chosen: Sequence[Riders], load: Load) -> bool:
    knobs, longest = chosen[0].knobs, 0
    for riders in chosen:
        if riders.knobs != knobs:
            return False
        longest = max(longest, riders.longest)
    rows, tokens = total(chosen)
    return len(chosen) == 1 or rows * longest <= load.max_padding * tokens


def _as_one(part: Sequence[Riders]) -> Riders:
    if len(part) == 1:
        return part[0]
    return Riders(
        Rows(tuple([piece for riders in part for piece in riders.rows.pieces])),
        part[0].knobs,
        [owner for riders in part for owner in riders.owners],
        [length for riders in part for length in riders.lengths],
    )


def as_numpy(answer: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = answer.float().cpu().numpy()
    return array
