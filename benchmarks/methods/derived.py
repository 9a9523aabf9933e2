"""What the results say, worked out from their files alone (reading.py): nothing is trained or run here.

For each line of a data set (a method, or a method's other rule on the same weights) and each seed: quality
at 1.5, 2 and 3 times fewer FLOPs than the full model fine-tuned with that seed, the area under the curve, and
the difference from the static truncated models at their own FLOPs. What was not run is said to be so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curves import SPEEDUPS, Curve, mean_curve, standard_error

AGAINST = (2, 3, 4)
"""Depths of the truncated models that the verdict is about."""

MAX_DROP = 1.0
"""Points that may be lost against the full model at twice fewer FLOPs: the bar of the comparison."""

NOT_RUN = "not yet run"
_TIE = 1e-9  # qualities are rounded to 1e-5; less than this is rounding of the interpolation


@dataclass(frozen=True, slots=True)
class Baselines:
    """Of one set and seed. quality, flops: of the full model; static: depth -> (share of FLOPs, quality)."""

    quality: float
    flops: float
    static: Mapping[int, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Seed:
    """One line's numbers with one seed; costs are shares of the full model's FLOPs.

    at          speed-up -> quality; None where even the cheapest point costs more
    against     depth of a truncated model that was run -> quality above it; None likewise
    own_full    (cost, quality) when nobody leaves early, all exits evaluated
    exits       (depth, cost, quality) of each exit's answers on every row
    measured    the file's own record
    """

    seed: int
    base: Baselines
    curve: Curve
    area: float
    at: Mapping[float, float | None]
    against: Mapping[int, float | None]
    own_full: tuple[float, float]
    exits: tuple[tuple[int, float, float], ...]
    measured: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Mean:
    """Over `n` seeds; spread is the standard deviation, None for one seed."""

    value: float
    spread: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Line:
    """status: "done", or why there are no numbers; seeds: those that are done, their baselines too."""

    name: str
    method: str
    status: str
    seeds: tuple[Seed, ...]

    def mean(self, value: Callable[[Seed], float | None]) -> Mean | None:
        """None where there is no seed, or one that has no such number."""
        values = [value(seed) for seed in self.seeds]
        if not values or None in values:
            return None
        return mean_of([v for v in values if v is not None])

    def against(self, depth: int) -> Mean | None:
        return self.mean(lambda seed: seed.against.get(depth))

    @property
    def curve(self) -> Curve | None:
        return mean_curve([seed.curve for seed in self.seeds]) if self.seeds else None

    @property
    def verdict(self) -> str:
        """Against the truncated models of AGAINST: "above" all, "below" all, "mixed", or not yet run."""
        if not self.seeds or any(set(AGAINST) - set(s.against) for s in self.seeds):
            return NOT_RUN
        above = [(m := self.against(d)) is not None and m.value > _TIE for d in AGAINST]
        return "above" if all(above) else "mixed" if any(above) else "below"

    def sure(self, depth: int) -> bool:
        """Whether the difference is more than two standard errors of two independent samples of rows."""
        difference = self.against(depth)
        if difference is None:
            return False
        measured = self.seeds[0].measured
        rows, metric = measured["rows"]["test"], measured["metric"]
        static = statistics.fmean(seed.base.static[depth][1] for seed in self.seeds)
        here = (static + difference.value, static)
        error = math.hypot(*(standard_error(q, rows, metric) for q in here))
        return abs(difference.value) > 2 * error

    @property
    def drop_at_2x(self) -> Mean | None:
        """Points lost against the separately fine-tuned full model at twice fewer FLOPs."""
        return self.mean(_drop_at_2x)


@dataclass(frozen=True, slots=True)
class SetNumbers:
    """bases: of the seeds whose full model was run; wanted: how many seeds there are to be."""

    name: str
    wanted: int
    bases: Mapping[int, Baselines]
    lines: tuple[Line, ...]

    @property
    def static_curve(self) -> Curve | None:
        curves = [Curve.of(base.static.values()) for base in self.bases.values() if base.static]
        return mean_curve(curves) if curves else None

    def static(self, depth: int) -> tuple[Mean, Mean] | None:
        """(cost, quality) of the truncated model, over seeds."""
        found = [base.static[depth] for base in self.bases.values() if depth in base.static]
        if not found:
            return None
        return mean_of([cost for cost, _ in found]), mean_of([quality for _, quality in found])

    @property
    def full(self) -> Mean | None:
        values = [base.quality for base in self.bases.values()]
        return mean_of(values) if values else None

    @property
    def about(self) -> Mapping[str, Any] | None:
        """A measured record, for what is the same in all: metric, rows, tokens."""
        return next((s.measured for line in self.lines for s in line.seeds), None)

    def best(self, value: Callable[[Line], Mean | None]) -> tuple[list[str], float] | None:
        """The lines with the largest value, and it; None where no line has one."""
        known = [(line.name, mean.value) for line in self.lines if (mean := value(line))]
        if not known:
            return None
        top = max(value for _, value in known)
        return [name for name, value in known if value > top - _TIE], top


def at(speedup: float) -> Callable[[Line], Mean | None]:
    return lambda line: line.mean(lambda seed: seed.at[speedup])


def area(line: Line) -> Mean | None:
    return line.mean(lambda seed: seed.area)


def own_full(line: Line) -> Mean | None:
    return line.mean(lambda seed: seed.own_full[1])


def full_cost(line: Line) -> Mean | None:
    """Share of FLOPs that full depth costs with all exits evaluated."""
    return line.mean(lambda seed: seed.own_full[0])


def cheapest(line: Line) -> Mean | None:
    return line.mean(lambda seed: seed.curve.cheapest)


def seed_numbers(
    seed: int,
    measured: Mapping[str, Any],
    base: Baselines,
    curve_of: Sequence[Mapping[str, Any]] = (),
) -> Seed:
    """Everything that is read off one measured record. The curve is of its points and of full depth, unless
    `curve_of` names others."""

    def point(p: Mapping[str, Any]) -> tuple[float, float]:
        return p["flops"] / base.flops, p["quality"]

    curve = Curve.of(point(p) for p in curve_of or [*measured["points"], measured["full_depth"]])
    against = {}
    for depth in AGAINST:
        if depth in base.static:
            cost, quality = base.static[depth]
            here = curve.at(cost)
            against[depth] = None if here is None else here - quality
    return Seed(
        seed,
        base,
        curve,
        curve.area(),
        {speedup: curve.at(1 / speedup) for speedup in SPEEDUPS},
        against,
        point(measured["full_depth"]),
        tuple((e["depth"], *point(e)) for e in measured["exits"]),
        measured,
    )


def _drop_at_2x(seed: Seed) -> float | None:
    here = seed.at[2.0]
    return None if here is None else 100 * (seed.base.quality - here)


def mean_of(values: Sequence[float]) -> Mean:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Mean(statistics.fmean(values), spread, len(values))
