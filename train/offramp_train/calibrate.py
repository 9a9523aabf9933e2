"""Finding an operating point: the knobs that run the fewest layers for a given loss of quality, or the best
quality for a given mean depth. Works on any method's knobs, by replay (replay.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from offramp_common.errors import ConfigError
from offramp_common.runner import Knobs
from offramp_common.spec import KnobSpec, never_exit
from offramp_train.replay import Score, Scorer

_GRID = 60  # values of a continuous knob that are tried
_PRICES = tuple(0.05 * 1.6**i for i in range(14))  # layers paid for a point of quality, 0.05 to 22


@dataclass(frozen=True, slots=True)
class Goal:
    """Exactly one of the first two.

    max_drop    points of quality (hundredths) that may be lost against full depth
    mean_depth  layers that a row may run on average
    margin      points kept in hand, because calibration data is only a sample
    per_exit    move continuous knobs exit by exit; False keeps one value for all of them, which leaves
                later but carries over to other data better
    """

    max_drop: float | None = None
    mean_depth: float | None = None
    margin: float = 0.0
    per_exit: bool = True

    def __post_init__(self) -> None:
        if (self.max_drop is None) == (self.mean_depth is None):
            raise ConfigError("give one of --max-drop and --mean-depth")

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
    """An operating point and its score; `full` is the score of never leaving early."""

    knobs: Knobs
    score: Score
    full: Score

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
    of several prices of a point of quality, and last within the goal. Raises ConfigError when the goal
    cannot be reached.
    """
    never = never_exit(scorer.specs, scorer.n_layers)
    best = _Best(scorer, goal, scorer.score(never))
    best.look(never)
    grids = {spec.name: grid(scorer, spec) for spec in scorer.specs}
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
    """Values worth trying: all whole ones, or a grid that is finer towards "never leave"."""
    if spec.integer:
        return tuple(float(v) for v in range(int(spec.low), int(spec.high) + 1))
    if abs(spec.never - spec.high) < abs(spec.never - spec.low):
        step = (spec.high - spec.low) / _GRID
        return tuple(spec.low + step * i for i in range(_GRID + 1))
    # The top of the interval may be far above anything that occurs: come down until it matters.
    others = {s.name: (s.low if s.integer else s.high) for s in scorer.specs}
    high = spec.high
    lowest = scorer.score(_common(scorer, {**others, spec.name: high})).mean_depth
    while high > 1e-9:
        lower = spec.low + (high - spec.low) / 1.25
        if scorer.score(_common(scorer, {**others, spec.name: lower})).mean_depth > lowest + 1e-12:
            break
        high = lower
    return tuple(spec.low + (high - spec.low) * (i / _GRID) ** 2 for i in range(_GRID + 1))


def common_points(scorer: Scorer, grids: dict[str, tuple[float, ...]]) -> Iterator[Knobs]:
    """Every combination of the grids' values, the same at all exits."""
    names = [spec.name for spec in scorer.specs]
    for values in product(*(grids[name] for name in names)):
        yield _common(scorer, dict(zip(names, values, strict=True)))


def sweep(scorer: Scorer, points: int = 12) -> list[tuple[Knobs, Score]]:
    """The curve: operating points with one value for all exits, about evenly spread over mean depth.

    With several knobs, points that another beats in both depth and quality are left out.
    """
    grids = {spec.name: grid(scorer, spec) for spec in scorer.specs}
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
