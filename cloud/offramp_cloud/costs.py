"""What a layer costs, learned while layers run, and whether waiting for more rows is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp_common.meeting import Meeting

_KEPT = 0.99  # an observation counts half as much after 69 more
_REFIT = 16  # observations; the first ones count at once
_EARLY = (1, 2, 4, 8)
_OUTLIER = 4.0  # times the expected: somebody else had the processor


class Group(NamedTuple):
    """Rows taken together; `tokens` of all of them."""

    rows: int
    tokens: int

    def plus(self, other: Group) -> Group:
        return Group(self.rows + other.rows, self.tokens + other.tokens)


class LayerCost:
    """seconds = fixed + a x tokens + b x rows, of one layer with its exit head.

    A least-squares fit of the relative error, older observations counting less, none of the three below 0.
    The fixed part is what sharing a layer saves.
    """

    def __init__(self, fixed_s: float = 5e-4, token_s: float = 5e-5, row_s: float = 2e-5) -> None:
        """The costs that are assumed until some are observed."""
        self._learned = [fixed_s, token_s, row_s]
        # Sums of products of two features, and of one: plain numbers, because arrays of three are slower.
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._products = [0.0] * 3
        for i, assumed in enumerate(self._learned):  # counts as a little of an observation
            self._squares[i][i] = 0.05 / max(assumed, 1e-7) ** 2
            self._products[i] = self._squares[i][i] * assumed
        self._seen = 0

    def saw(self, group: Group, seconds: float) -> None:
        """A layer over these rows took so long."""
        if not seconds > 0 or not group.rows:
            return
        if self._seen >= _REFIT:
            seconds = min(seconds, _OUTLIER * self.seconds(group))
        features = (1.0 / seconds, group.tokens / seconds, group.rows / seconds)
        for i, one in enumerate(features):
            row = self._squares[i]
            for j, other in enumerate(features):
                row[j] = row[j] * _KEPT + one * other
            self._products[i] = self._products[i] * _KEPT + one
        self._seen += 1
        if self._seen % _REFIT == 0 or self._seen in _EARLY:
            self._learned = _not_negative(np.array(self._squares), np.array(self._products))

    def seconds(self, group: Group) -> float:
        """Expected for one layer."""
        fixed_s, token_s, row_s = self._learned
        return fixed_s + token_s * group.tokens + row_s * group.rows


def _not_negative(squares: NDArray[np.float64], products: NDArray[np.float64]) -> list[float]:
    """The best coefficients with none below 0: those that would be are left out, worst first."""
    kept = [0, 1, 2]
    found = [0.0] * 3
    while kept:
        part = np.linalg.lstsq(squares[np.ix_(kept, kept)], products[kept], rcond=None)[0]
        if (part >= 0).all():
            for i, value in zip(kept, part.tolist(), strict=True):
                found[i] = value
            break
        del kept[int(part.argmin())]
    return found


class Survival:
    """How far rows go on average, from where those before them left."""

    def __init__(self, n_layers: int) -> None:
        self._ran = [1] * n_layers  # one row that never left: so that nothing is divided by zero
        self._left = [0] * n_layers
        self._expected = [float(n_layers - depth) for depth in range(n_layers + 1)]

    def saw(self, depth: int, ran: int, left: int) -> None:
        """Of `ran` rows that ran the layer at `depth`, so many left behind it."""
        self._ran[depth] += ran
        self._left[depth] += left
        for layer in range(depth, -1, -1):
            stays = 1 - self._left[layer] / self._ran[layer]
            self._expected[layer] = 1 + stays * self._expected[layer + 1]

    def layers(self, depth: int) -> float:
        """Expected to be run from `depth` on, by a row that is there."""
        return self._expected[depth]


def meeting(
    cost: LayerCost, lower: Sequence[tuple[int, Group]], upper: Group, meet: int, shared: float
) -> Meeting:
    """lower    (depth, rows waiting there), ascending, all below `meet`, where `upper` wait
    shared   layers expected from `meet` on
    """
    below = Group(0, 0)
    climb_s = 0.0
    for place, (depth, group) in enumerate(lower):
        below = below.plus(group)
        until = lower[place + 1][0] if place + 1 < len(lower) else meet
        climb_s += (until - depth) * cost.seconds(below)
    below_s, upper_s, together_s = (
        shared * cost.seconds(group) for group in (below, upper, below.plus(upper))
    )
    return Meeting(below.rows, upper.rows, climb_s, below_s, upper_s, together_s)
