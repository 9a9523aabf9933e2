"""Finding an operating point: the knobs that run the fewest layers for a given loss of quality, or the best
quality for a given mean depth. Works on any method's knobs, by replay (replay.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from math import prod

from offramp_common.errors import ConfigError
from offramp_common.runner import Knobs
from offramp_common.spec import KnobSpec, never_exit
from offramp_train.conformal import Guarantee, guaranteed
from offramp_train.replay import Score, Scorer

_GRID = 60  # values of a continuous knob that are tried
_FINEST = 2.0**-20  # distance of two such values, as a share of the knob's range
_MOST = 4000  # combinations of values that are tried, the same at all exits
_PRICES = tuple(0.05 * 1.6**i for i in range(14))  # layers paid for a point of quality, 0.05 to 22


@dataclass(frozen=True, slots=True)
class Goal:
    """Exactly one of max_drop, mean_depth and epsilon.

    max_drop    points of quality (hundredths) that may be lost against full depth
    mean_depth  layers that a row may run on average
    epsilon     risk that an answer is not the full model's, kept by a guarantee (conformal.py); one value
                for all exits, without a margin
    margin      points kept in hand, because calibration data is only a sample
    per_exit    move continuous knobs exit by exit; False keeps one value for all of them, which leaves
                later but carries over to other data better
    """

    max_drop: float | None = None
    mean_depth: float | None = None
    margin: float = 0.0
    per_exit: bool = True
    epsilon: float | None = None

    def __post_init__(self) -> None:
        goals = (self.max_drop, self.mean_depth, self.epsilon)
        if sum(goal is not None for goal in goals) != 1:
            raise ConfigError("give one of --max-drop, --mean-depth and --epsilon")
        if self.epsilon is not None and not 0 <= self.epsilon < 1:
            raise ConfigError(f"--epsilon {self.epsilon:g}: must be at least 0 and below 1")

    def allows(self, score: Score, full: Score) -> bool:
        if self.mean_depth is not None:
            return score.mean_depth <= self.mean_depth + 1e-9
        assert self.max_drop is not None
        return 100 * (full.quality - score.quality) <= max(self.max_drop - self.margin, 0.0) + 1e-9

    def rank(self, score: Score) -> tuple[float, float]:
        """Smaller is better, among scores that are allowed."""
        if self.mean_depth is not None:
            return (-score.quality, score.mean_depth)
        return (score.mean_depth, -score.quality)


@dataclass(frozen=True, slots=True)
class Point:
    """An operating point and its score; `full` is the score of never leaving early; `guarantee` what is
    promised of it."""

    knobs: Knobs
    score: Score
    full: Score
    guarantee: Guarantee | None = None

    @property
    def drop(self) -> float:
        """Points lost against full depth; negative where leaving early is better."""
        return 100 * (self.full.quality - self.score.quality)


@dataclass
class _Best:
    """Remembers the best allowed point of all that were looked at."""

    scorer: Scorer
    goal: Goal
    full: Score
    knobs: Knobs | None = None
    score: Score | None = None
    shallowest: float = field(default=float("inf"))

    def look(self, knobs: Knobs) -> Score:
        score = self.scorer.score(knobs)
        self.shallowest = min(self.shallowest, score.mean_depth)
        better = self.score is None or self.goal.rank(score) < self.goal.rank(self.score)
        if better and self.goal.allows(score, self.full):
            self.knobs, self.score = knobs, score
        return score


def calibrate(scorer: Scorer, goal: Goal) -> Point:
    """The best operating point found.

    Whole-number knobs are enumerated and continuous ones swept, one value for all exits. Where the policy
    carries no state, continuous knobs are then moved exit by exit: from the best common value, once for each
    of several prices of a point of quality, and last within the goal. A risk needs no search.
    Raises ConfigError when the goal cannot be reached.
    """
    never = never_exit(scorer.specs, scorer.n_layers)
    if goal.epsilon is not None:
        knobs, guarantee = guaranteed(scorer, goal.epsilon)
        return Point(knobs, scorer.score(knobs), scorer.score(never), guarantee)
    best = _Best(scorer, goal, scorer.score(never))
    best.look(never)
    grids = grids_of(scorer)
    for knobs in common_points(scorer, grids):
        best.look(knobs)
    moved = [spec for spec in scorer.specs if not spec.integer]
    if goal.per_exit and scorer.memoryless and moved and best.knobs is not None:
        start = best.knobs
        for price in _PRICES:
            _descend(best, start, moved, grids, price)
        _descend(best, best.knobs, moved, grids, None)
    if best.knobs is None or best.score is None:
        raise ConfigError(
            f"a mean depth of {goal.mean_depth:g} cannot be reached: {best.shallowest:.3f} is the least"
        )
    return Point(best.knobs, best.score, best.full)


def grid(scorer: Scorer, spec: KnobSpec) -> tuple[float, ...]:
    """Values worth trying: all whole ones, or more where they matter more."""
    if spec.integer:
        return tuple(float(v) for v in range(int(spec.low), int(spec.high) + 1))
    others = {s.name: _eager(s) for s in scorer.specs}
    if _eager(spec) == spec.low:
        return _halvings(scorer, spec, others)
    # The top of the interval may be far above anything that occurs: come down until it matters.
    high = spec.high
    lowest = scorer.score(_common(scorer, {**others, spec.name: high})).mean_depth
    while high > 1e-9:
        lower = spec.low + (high - spec.low) / 1.25
        if scorer.score(_common(scorer, {**others, spec.name: lower})).mean_depth > lowest + 1e-12:
            break
        high = lower
    return tuple(spec.low + (high - spec.low) * (i / _GRID) ** 2 for i in range(_GRID + 1))


def _halvings(scorer: Scorer, spec: KnobSpec, others: dict[str, float]) -> tuple[float, ...]:
    """The interval, halved again and again where mean depth changes most: confidences may lie all near 1,
    or all just above one over the number of classes."""

    def depth(value: float) -> float:
        return scorer.score(_common(scorer, {**others, spec.name: value})).mean_depth

    depths = {value: depth(value) for value in (spec.low, spec.high)}
    least = _FINEST * (spec.high - spec.low)
    while len(depths) <= _GRID:
        steps = [
            (abs(depths[a] - depths[b]), a, b) for a, b in pairwise(sorted(depths)) if b - a > least
        ]
        change, a, b = max(steps, default=(0.0, 0.0, 0.0))
        if change == 0:
            break
        depths[(a + b) / 2] = depth((a + b) / 2)
    return tuple(sorted(depths))


def _eager(spec: KnobSpec) -> float:
    """The end of a knob's range at which rows leave soonest: the one away from "never leave"."""
    return spec.low if abs(spec.never - spec.high) < abs(spec.never - spec.low) else spec.high


def grids_of(scorer: Scorer) -> dict[str, tuple[float, ...]]:
    """The grid of every knob; those of methods with three and more are thinned, ends kept."""
    grids = {spec.name: grid(scorer, spec) for spec in scorer.specs}
    while prod(map(len, grids.values())) > _MOST:
        name = max(grids, key=lambda name: len(grids[name]))
        if len(grids[name]) <= 2:
            break
        grids[name] = (*grids[name][:-1:2], grids[name][-1])
    return grids


def common_points(scorer: Scorer, grids: dict[str, tuple[float, ...]]) -> Iterator[Knobs]:
    """Every combination of the grids' values, the same at all exits."""
    names = [spec.name for spec in scorer.specs]
    for values in product(*(grids[name] for name in names)):
        yield _common(scorer, dict(zip(names, values, strict=True)))


def sweep(scorer: Scorer, points: int = 12) -> list[tuple[Knobs, Score]]:
    """The curve: operating points with one value for all exits, about evenly spread over mean depth.

    With several knobs, points that another beats in both depth and quality are left out.
    """
    grids = grids_of(scorer)
    candidates = [*common_points(scorer, grids), never_exit(scorer.specs, scorer.n_layers)]
    scored = [(knobs, scorer.score(knobs)) for knobs in candidates]
    scored.sort(key=lambda entry: (entry[1].mean_depth, -entry[1].quality))
    single = len(scorer.specs) == 1
    kept: list[tuple[Knobs, Score]] = []
    for knobs, score in scored:
        # With one knob all points are its curve; with several only the best of each depth are.
        if single or not kept or score.quality > kept[-1][1].quality:
            kept.append((knobs, score))
    return _thinned(kept, points)


def _thinned(scored: list[tuple[Knobs, Score]], points: int) -> list[tuple[Knobs, Score]]:
    low, high = scored[0][1].mean_depth, scored[-1][1].mean_depth
    wanted = [low + (high - low) * i / (points - 1) for i in range(points)]
    chosen = sorted(
        {min(range(len(scored)), key=lambda i: abs(scored[i][1].mean_depth - w)) for w in wanted}
    )
    return [scored[i] for i in chosen]


def _descend(
    best: _Best,
    knobs: Knobs,
    specs: list[KnobSpec],
    grids: dict[str, tuple[float, ...]],
    price: float | None,
) -> None:
    """Coordinate descent over exits and knobs, on depth + price * points lost; None: on the goal itself."""

    def cost(score: Score) -> tuple[float, ...]:
        if price is not None:
            return (score.mean_depth - 100 * price * score.quality,)
        allowed = best.goal.allows(score, best.full)
        return best.goal.rank(score) if allowed else (float("inf"),)

    lowest, moved = cost(best.scorer.score(knobs)), True
    while moved:
        moved = False
        for spec, depth in product(specs, best.scorer.exits[:-1]):
            for value in grids[spec.name]:
                changed = _with(knobs, spec.name, depth, value)
                here = cost(best.look(changed))
                if here < lowest:
                    knobs, lowest, moved = changed, here, True


def _with(knobs: Knobs, name: str, depth: int, value: float) -> Knobs:
    values = list(knobs[name])
    values[depth - 1] = value
    return {**knobs, name: tuple(values)}


def _common(scorer: Scorer, values: dict[str, float]) -> Knobs:
    return {name: (value,) * scorer.n_layers for name, value in values.items()}
