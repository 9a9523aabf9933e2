"""The comparison's derived numbers on curves made by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import reading
from curves import Curve, mean_curve, standard_error
from derived import NOT_RUN, Baselines, Line, Seed, at, seed_numbers
from families import FAMILIES, all_lines
from reading import set_numbers

from offramp_model.methods import METHODS

FULL = 1000.0  # FLOPs of the full model


def test_between_two_points_quality_is_that_of_tossing_a_coin() -> None:
    curve = Curve.of([(0.4, 0.80), (0.8, 0.90)])
    # A quarter of the way: three of four samples take the cheap point.
    assert curve.at(0.5) == pytest.approx(0.75 * 0.80 + 0.25 * 0.90)
    assert curve.at(0.4) == 0.80
    assert curve.at(0.8) == 0.90


def test_only_neighbours_are_joined_even_where_a_point_between_is_worse() -> None:
    curve = Curve.of([(1.0, 0.9), (0.2, 0.8), (0.6, 0.7)])
    assert curve.at(0.4) == pytest.approx(0.75)
    assert curve.at(0.8) == pytest.approx(0.80)


def test_a_budget_below_the_cheapest_point_cannot_be_met() -> None:
    assert Curve.of([(0.4, 0.8), (1.0, 0.9)]).at(0.39) is None


def test_a_budget_above_the_dearest_point_buys_nothing_more() -> None:
    assert Curve.of([(0.4, 0.8), (0.9, 0.9)]).at(1.0) == 0.9


def test_points_of_one_cost_become_their_mean() -> None:
    assert Curve.of([(0.5, 0.8), (0.5, 0.9), (1.0, 1.0)]).at(0.5) == pytest.approx(0.85)


def test_the_area_is_the_mean_quality_over_budgets_from_a_third_to_one() -> None:
    assert Curve.of([(0.1, 0.9), (1.0, 0.9)]).area() == pytest.approx(0.9)
    # A straight line: the quality at the middle of the interval.
    line = Curve.of([(0.0, 0.0), (1.0, 0.9)])
    assert line.area() == pytest.approx(0.9 * 2 / 3)
    # Two pieces: 0.6 to 0.8 over [1/3, 2/3], 0.8 from there.
    bent = Curve.of([(1 / 3, 0.6), (2 / 3, 0.8), (1.0, 0.8)])
    assert bent.area() == pytest.approx((0.7 + 0.8) / 2)


def test_below_the_cheapest_point_the_area_counts_samples_without_an_answer_as_wrong() -> None:
    # At a budget b below 2/3 a share b / (2/3) of the samples is answered: 0.45 at 1/3, 0.9 at 2/3.
    curve = Curve.of([(2 / 3, 0.9), (1.0, 0.9)])
    assert curve.anywhere(1 / 3) == pytest.approx(0.45)
    assert curve.area() == pytest.approx(((0.45 + 0.9) / 2 + 0.9) / 2)


def test_the_mean_over_seeds_is_taken_where_all_seeds_have_a_curve() -> None:
    mean = mean_curve([Curve.of([(0.2, 0.6), (1.0, 0.8)]), Curve.of([(0.4, 0.9), (1.0, 1.0)])])
    assert mean.cheapest == pytest.approx(0.4)
    assert mean.at(0.4) == pytest.approx((0.65 + 0.9) / 2)
    assert mean.at(1.0) == pytest.approx(0.9)


def test_the_standard_error_is_binomial_for_accuracy() -> None:
    assert standard_error(0.9, 400, "accuracy") == pytest.approx(0.015)
    assert standard_error(0.6, 64, "pearson") == pytest.approx(0.64 / 8)


def _measured(
    *points: tuple[float, float], full: tuple[float, float] = (1.1, 0.92)
) -> dict[str, Any]:
    """Costs are shares; the file has FLOPs."""

    def point(cost: float, quality: float) -> dict[str, float]:
        return {"flops": cost * FULL, "quality": quality}

    return {
        "metric": "accuracy",
        "rows": {"test": 400, "dev": 100},
        "points": [point(*p) for p in points],
        "full_depth": point(*full),
        "exits": [{"depth": 1, **point(0.2, 0.7)}],
    }


def _seed(seed: int, measured: Mapping[str, Any], base: Baselines) -> Line:
    return Line("a", "deebert", "done", (seed_numbers(seed, measured, base),))


BASE = Baselines(0.93, FULL, {2: (0.35, 0.80), 3: (0.51, 0.86), 4: (0.68, 0.90), 6: (1.0, 0.93)})


def test_speed_ups_are_against_the_separate_full_models_flops_not_the_methods_own() -> None:
    numbers = seed_numbers(0, _measured((0.3, 0.7), (0.5, 0.85)), BASE)
    assert numbers.at[2.0] == pytest.approx(0.85)
    assert numbers.at[3.0] == pytest.approx(0.7 + (1 / 3 - 0.3) / 0.2 * 0.15)
    assert numbers.at[1.5] == pytest.approx(0.85 + (2 / 3 - 0.5) / 0.6 * 0.07)
    cost, quality = numbers.own_full
    assert cost == pytest.approx(1.1)
    assert quality == 0.92


def test_what_is_lost_at_2x_counts_from_the_separate_full_model() -> None:
    line = _seed(0, _measured((0.3, 0.7), (0.5, 0.925)), BASE)
    lost = line.drop_at_2x
    assert lost is not None
    assert lost.value == pytest.approx(0.5)


def test_truncated_models_are_compared_at_their_own_flops() -> None:
    numbers = seed_numbers(0, _measured((0.3, 0.80), (0.8, 0.90)), BASE)
    # At 0.51 of the FLOPs the line has 0.842, two points below the three layers' 0.86.
    assert numbers.against[3] == pytest.approx(0.80 + 0.1 * 0.21 / 0.5 - 0.86)
    assert set(numbers.against) == {2, 3, 4}


@pytest.mark.parametrize(
    ("points", "verdict"),
    [
        (((0.3, 0.9), (0.8, 0.95)), "above"),
        (((0.3, 0.5), (0.8, 0.6)), "below"),
        (((0.3, 0.9), (0.51, 0.8), (0.8, 0.95)), "mixed"),
        # Two layers' FLOPs are not reached: that is not above.
        (((0.4, 0.9), (0.8, 0.95)), "mixed"),
        # As good as the truncated models at every depth: not above.
        (((0.35, 0.80), (0.51, 0.86), (0.68, 0.90)), "below"),
    ],
)
def test_the_verdict_is_above_all_some_or_none_of_the_truncated_models(
    points: tuple[tuple[float, float], ...], verdict: str
) -> None:
    assert _seed(0, _measured(*points), BASE).verdict == verdict


def test_without_all_truncated_models_there_is_no_verdict() -> None:
    base = Baselines(0.93, FULL, {2: (0.35, 0.80), 6: (1.0, 0.93)})
    assert _seed(0, _measured((0.3, 0.9)), base).verdict == NOT_RUN


def test_a_difference_is_sure_when_it_is_more_than_two_standard_errors() -> None:
    # 400 rows near 0.86: two standard errors of a difference are about five points.
    assert _seed(0, _measured((0.3, 0.95), (0.8, 0.95)), BASE).sure(3)
    assert not _seed(0, _measured((0.3, 0.88), (0.8, 0.88)), BASE).sure(3)


def test_seeds_give_mean_and_spread_and_a_number_that_one_lacks_is_missing() -> None:
    seeds: tuple[Seed, ...] = tuple(
        seed_numbers(i, _measured((cheap, 0.8), (0.5, q)), BASE)
        for i, (cheap, q) in enumerate([(0.3, 0.84), (0.3, 0.86), (0.4, 0.88)])
    )
    line = Line("a", "deebert", "done", seeds)
    mean = at(2.0)(line)
    assert mean is not None
    assert mean.value == pytest.approx(0.86)
    assert mean.n == 3
    assert mean.spread == pytest.approx(0.02)
    assert at(3.0)(line) is None
    one = at(2.0)(Line("a", "deebert", "done", seeds[:1]))
    assert one is not None
    assert one.spread is None


def _results(**entries: Any) -> dict[tuple[str, str, int], Any]:
    return {("trec", name.replace("_0", "-"), 0): value for name, value in entries.items()}


def _done(entry: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    return {"status": "done", "measured": {entry: measured}}


def test_missing_results_are_said_to_be_missing_and_never_guessed() -> None:
    full = _measured(full=(1.0, 0.93))
    results = _results(
        full=_done("full", full),
        deebert=_done("deebert", _measured((0.3, 0.9))),
        pabee={"status": "refused", "reason": "because"},
    )
    numbers = set_numbers("trec", results)
    lines = {line.name: line for line in numbers.lines}
    assert lines["deebert"].status == "done"
    assert lines["deebert"].verdict == NOT_RUN
    assert lines["pabee"].status == "refused: because"
    assert lines["romebert"].status == NOT_RUN
    assert at(2.0)(lines["romebert"]) is None
    assert numbers.static(3) is None
    best = numbers.best(at(2.0))
    assert best is not None
    assert best[0] == ["deebert"]


def test_without_its_full_model_a_run_has_no_numbers() -> None:
    numbers = set_numbers("trec", _results(deebert=_done("deebert", _measured((0.3, 0.9)))))
    line = next(line for line in numbers.lines if line.name == "deebert")
    assert line.seeds == ()
    assert line.status == f"its full model is {NOT_RUN}"
    assert numbers.best(at(2.0)) is None


def test_methods_for_classes_alone_are_not_waited_for_on_a_regression() -> None:
    lines = {line.name: line.status for line in set_numbers("stsb", {}).lines}
    assert lines["deebert"] == "not for regression"
    assert lines["pabee"] == NOT_RUN
    assert "elasticbert (patience)" not in lines


def test_the_bandits_pass_is_a_line_of_its_own_without_full_depth() -> None:
    played = [
        {"price": 0.1, "flops": 400.0, "quality": 0.8},
        {"price": 0.0, "flops": 990.0, "quality": 0.9},
    ]
    result = {**_done("uee_ucb", _measured((0.3, 0.7))), "online": {"points": played}}
    results = _results(full=_done("full", _measured(full=(1.0, 0.93))), uee_ucb=result)
    lines = {line.name: line for line in set_numbers("trec", results).lines}
    curve = lines[f"uee_ucb ({reading.ONLINE})"].curve
    assert curve is not None
    assert curve.points == ((0.4, 0.8), (0.99, 0.9))
    assert lines["uee_ucb"].curve != curve


def test_every_line_is_in_one_family_that_can_be_told_apart() -> None:
    listed = [name for family in FAMILIES for name in family.lines]
    assert sorted(listed) == sorted(all_lines())
    assert {name.partition(" ")[0] for name in listed} == set(METHODS)
    # As many looks as plots.py has.
    assert max(len(family.lines) for family in FAMILIES) <= 5
    assert math.isclose(sum(len(f.lines) for f in FAMILIES), len(set(listed)))
