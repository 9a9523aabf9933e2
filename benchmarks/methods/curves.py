"""A curve of quality against compute, and the numbers that are read off it.

Costs are shares of the separately fine-tuned full model's FLOPs; qualities lie in [0, 1] (a correlation
may be below). Between two measured neighbours a curve is a straight line: for accuracy that is exactly what
tossing a coin for each sample gives, one point or the other.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

SPEEDUPS = (1.5, 2.0, 3.0)
"""So many times fewer FLOPs than the full model."""

LOW, HIGH = 1 / 3, 1.0
"""The area under a curve is over these shares of the full model's FLOPs."""


@dataclass(frozen=True, slots=True)
class Curve:
    """points: (cost, quality), costs ascending, none twice."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """From measured points in any order; several of one cost become their mean (again a coin)."""
        grouped = groupby(sorted(points), key=lambda point: point[0])
        return cls(tuple((cost, _mean([q for _, q in same])) for cost, same in grouped))

    @property
    def cheapest(self) -> float:
        return self.points[0][0]

    def at(self, cost: float) -> float | None:
        """Quality at a budget. None below the cheapest point; above the dearest, which needs no more, its
        quality."""
        if cost < self.cheapest:
            return None
        index = bisect_left(self.points, (cost,))
        if index == len(self.points):
            return self.points[-1][1]
        if index == 0:
            return self.points[0][1]
        (x0, y0), (x1, y1) = self.points[index - 1], self.points[index]
        return y0 + (y1 - y0) * (cost - x0) / (x1 - x0)

    def anywhere(self, cost: float) -> float:
        """As `at`; below the cheapest point its quality for as many samples as the budget pays for, the
        others without an answer, which is wrong: a line to 0 at no cost."""
        known = self.at(cost)
        return self.points[0][1] * cost / self.cheapest if known is None else known

    def area(self, low: float = LOW, high: float = HIGH) -> float:
        """The mean of `anywhere` over budgets in [low, high], exact for the straight lines it is made of."""
        inside = [cost for cost, _ in self.points if low < cost < high]
        costs = [low, *inside, high]
        total = sum((self.anywhere(a) + self.anywhere(b)) / 2 * (b - a) for a, b in pairwise(costs))
        return total / (high - low)


def mean_curve(curves: Sequence[Curve], points: int = 33) -> Curve:
    """The mean over seeds, at evenly spaced costs that all of them reach; a single curve as it is."""
    if len(curves) == 1:
        return curves[0]
    low = max(curve.cheapest for curve in curves)
    high = max(low, *(curve.points[-1][0] for curve in curves))
    costs = sorted({low + (high - low) * i / (points - 1) for i in range(points)})
    return Curve(tuple((cost, _mean([curve.anywhere(cost) for curve in curves])) for cost in costs))


def standard_error(quality: float, rows: int, metric: str) -> float:
    """Of one quality on so many rows: binomial; for a correlation (1 - r^2) / sqrt(n), its usual estimate."""
    if metric == "accuracy":
        return math.sqrt(max(quality * (1 - quality), 0.0) / rows)
    return (1 - quality * quality) / math.sqrt(rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
