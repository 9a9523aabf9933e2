"""The table of what confidence says of later exits: fitted, chained, written and read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from offramp_common.forecast import Forecast, fit, never, of_rates, uniform

EXITS = (2, 3, 5, 6)


def recorded(rows: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples of one hidden ease: it shows in every exit's confidence, and the easy leave."""
    rng = np.random.default_rng(seed)
    ease_N = rng.random(rows)
    noise_EN = rng.normal(0, 0.1, (len(EXITS), rows))
    confidence_EN = np.clip(ease_N + noise_EN, 0, 1)
    return confidence_EN, confidence_EN > np.array([0.8, 0.7, 0.6, 0.5])[:, None]


def test_surer_samples_are_foreseen_to_leave_sooner() -> None:
    table = fit(EXITS, *recorded())
    for outlook in table.outlooks[1:-1]:
        assert list(outlook.leave) == sorted(outlook.leave)
        assert outlook.leave[-1] > outlook.leave[0] + 0.2
    assert [outlook.depth for outlook in table.outlooks] == [0, 2, 3, 5]


def test_layers_left_are_those_that_samples_really_run() -> None:
    confidence_EN, leave_EN = recorded()
    table = fit(EXITS, confidence_EN, leave_EN)
    leave_EN[-1] = True
    exit_N = np.array(EXITS)[leave_EN.argmax(axis=0)]
    left = table.layers_left()
    # Shares are rounded to four digits and drawn towards the mean by four samples of hundreds.
    assert left[0][0] == pytest.approx(exit_N.mean(), abs=0.03)
    stay_N = exit_N > EXITS[0]
    bin_N = [table.outlooks[1].bin_of(c) for c in confidence_EN[0][stay_N]]
    for b, layers in enumerate(left[1]):
        mine_N = np.array(bin_N) == b
        assert layers == pytest.approx((exit_N[stay_N][mine_N] - EXITS[0]).mean(), abs=0.15)


def test_merged_it_keeps_the_mean_and_forgets_confidence() -> None:
    table = fit(EXITS, *recorded())
    merged = table.merged()
    assert all(len(outlook.leave) == 1 for outlook in merged.outlooks)
    assert merged.layers_left()[0][0] == pytest.approx(table.layers_left()[0][0], abs=0.05)


def test_written_and_read_it_is_the_same() -> None:
    table = fit(EXITS, *recorded())
    assert Forecast.from_json(EXITS, json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize("harm", ["exits", "bins", "chance", "next"])
def test_a_damaged_table_is_refused(harm: str) -> None:
    rows, exits = fit(EXITS, *recorded()).to_json(), EXITS
    if harm == "exits":
        exits = (1, 3, 5, 6)
    elif harm == "bins":
        rows[1]["edges"] = rows[1]["edges"][:-1]
    elif harm == "chance":
        rows[1]["leave"][0] = 1.5
    else:
        rows[1]["next"][0] = rows[1]["next"][0][:-1]
    with pytest.raises(ValueError, match=r"forecast|chance"):
        Forecast.from_json(exits, rows)


def test_few_samples_make_few_bins_and_none_a_table_all_the_same() -> None:
    confidence_EN, leave_EN = recorded(40)
    assert all(len(o.edges) <= 1 for o in fit(EXITS, confidence_EN, leave_EN).outlooks)
    nobody = fit(EXITS, np.zeros((4, 0)), np.zeros((4, 0), bool))
    nobody.check()
    everybody = fit(EXITS, confidence_EN, np.ones_like(leave_EN))
    everybody.check()
    assert everybody.outlooks[0].leave[0] > 0.95


def test_confidences_that_are_not_numbers_count_as_the_least_sure() -> None:
    confidence_EN, leave_EN = recorded(500)
    confidence_EN[0, ::7] = np.nan
    table = fit(EXITS, confidence_EN, leave_EN)
    table.check()
    outlook = table.outlooks[1]
    assert outlook.bin_of(float("nan")) == outlook.bin_of(None) == 0
    assert outlook.bin_of(1.0) == len(outlook.leave) - 1


def test_without_a_table_a_sample_leaves_at_each_exit_alike_or_at_none() -> None:
    assert uniform(EXITS).layers_left()[0][0] == pytest.approx(sum(EXITS) / 4)
    assert never(EXITS).layers_left()[0][0] == 6
    assert of_rates((6,), (1.0,)).layers_left() == ((6.0,),)
