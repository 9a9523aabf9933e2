"""The guarantee: by hand, over many random splits, with good scores and worthless ones, and on record."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from offramp_common.activations import NumpyArray
from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_train.build import resolve_config
from offramp_train.calibrate import Goal, calibrate
from offramp_train.conformal import (
    Guarantee,
    on_record,
    scores_and_agreement,
    sentences_of,
    threshold_of,
)
from offramp_train.metrics import metric_of
from offramp_train.replay import Recording, Scorer, replay

E = 4  # early exits
CLASSES, NUMBER = TaskSpec("classification", ("a", "b", "c")), TaskSpec("regression")
EPSILONS = (0.01, 0.05, 0.1, 0.25)
_SPLITS, _ROWS = 200, 4000


def world(scores: str, seed: int = 0, rows: int = _ROWS) -> tuple[NumpyArray, NumpyArray]:
    """(score_EN, agrees_EN) of rows whose deeper exits agree more often.

    scores   "good": higher where an exit agrees; "random": of nothing; "wrong": lower where it agrees
    """
    rng = np.random.default_rng(seed)
    hard_N = rng.uniform(size=rows)
    agrees_EN = rng.uniform(size=(E, rows)) > hard_N * np.array([0.9, 0.6, 0.3, 0.1])[:, None]
    noise_EN = rng.uniform(size=(E, rows))
    lift = {"good": 0.5, "random": 0.0, "wrong": -0.5}[scores]
    return (noise_EN + lift * agrees_EN + 0.5) / 2, agrees_EN


def exit_of(score_EN: NumpyArray, threshold: float) -> NumpyArray:
    """The exit at which each row leaves, E for the last."""
    leave_EN = np.vstack([score_EN > threshold, np.ones(score_EN.shape[1], bool)])
    exit_N: NumpyArray = leave_EN.argmax(axis=0)
    return exit_N


def wrong_share(score_EN: NumpyArray, agrees_EN: NumpyArray, threshold: float) -> float:
    """The share of rows whose answer is not the full model's."""
    exit_N = exit_of(score_EN, threshold)
    with_last = np.vstack([agrees_EN, np.ones(agrees_EN.shape[1], bool)])
    return float(1 - with_last[exit_N, np.arange(len(exit_N))].mean())


# The threshold


def test_the_threshold_is_a_quantile_of_the_rows_worst_scores_and_infinity() -> None:
    score_EN = np.array([[0.9, 0.2, 0.7, 0.8, 0.3], [0.1, 0.6, 0.4, 0.5, 0.95]])
    agrees_EN = np.array([[True, False, False, False, False], [True, False, True, False, True]])
    # Row 0 agrees everywhere and is dropped. M of the others: 0.6, 0.7, 0.8, 0.3; in order, with infinity:
    # 0.3, 0.6, 0.7, 0.8, inf. Places 0 to 4 are the shares 0, 1/4, 1/2, 3/4 and 1.
    for epsilon, expected in (
        (0.0, math.inf),
        (0.2, math.inf),
        (0.25, 0.8),
        (0.5, 0.7),
        (0.6, 0.7),
    ):
        assert threshold_of(score_EN, agrees_EN, epsilon) == expected, epsilon


def test_it_equals_numpys_quantile_that_rounds_up() -> None:
    score_EN, agrees_EN = world("good", rows=437)
    largest = np.where(agrees_EN, -1.0, score_EN).max(axis=0)[~agrees_EN.all(axis=0)]
    for epsilon in (0.013, 0.05, 0.1, 0.3):
        # 9.0 for infinity, which numpy's own interpolation turns into NaN.
        expected = np.quantile([*largest, 9.0], 1 - epsilon, method="higher")
        assert threshold_of(score_EN, agrees_EN, epsilon) == expected


def test_rows_that_agree_everywhere_change_nothing() -> None:
    score_EN, agrees_EN = world("good", rows=300)
    more = np.hstack([score_EN, np.full((E, 500), 0.99)])
    agree = np.hstack([agrees_EN, np.ones((E, 500), bool)])
    for epsilon in EPSILONS:
        assert threshold_of(more, agree, epsilon) == threshold_of(score_EN, agrees_EN, epsilon)


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_with_fewer_than_one_over_epsilon_rows_nobody_leaves(rows: int) -> None:
    none = np.zeros((E, rows), bool)
    assert threshold_of(np.full((E, rows), 0.5), none, 0.1) == math.inf
    assert threshold_of(np.full((E, 10), 0.5), np.zeros((E, 10), bool), 0.1) == 0.5


def test_a_model_without_early_exits_has_the_threshold_infinity() -> None:
    assert threshold_of(np.zeros((0, 20)), np.zeros((0, 20), bool), 0.5) == math.inf


def test_a_larger_risk_never_raises_the_threshold_nor_the_mean_exit() -> None:
    score_EN, agrees_EN = world("good")
    risks = np.linspace(0.0, 0.6, 61)
    found = [threshold_of(score_EN, agrees_EN, risk) for risk in risks]
    assert all(a >= b for a, b in itertools.pairwise(found))
    exits = [exit_of(score_EN, threshold).mean() for threshold in found]
    assert exits[0] == E
    assert all(a >= b for a, b in itertools.pairwise(exits))
    assert exits[-1] < E - 1


def test_no_calibration_row_goes_wrong_at_risk_zero() -> None:
    for scores in ("good", "random", "wrong"):
        score_EN, agrees_EN = world(scores)
        assert wrong_share(score_EN, agrees_EN, threshold_of(score_EN, agrees_EN, 0.0)) == 0.0


def test_scores_that_are_all_equal_let_nobody_leave() -> None:
    _, agrees_EN = world("good")
    score_EN = np.full((E, _ROWS), 0.5)
    for epsilon in EPSILONS:
        assert (exit_of(score_EN, threshold_of(score_EN, agrees_EN, epsilon)) == E).all()


@pytest.mark.parametrize("scores", ["good", "random", "wrong"])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_promise_holds_over_random_splits_whatever_the_score_is_worth(
    scores: str, epsilon: float
) -> None:
    score_EN, agrees_EN = world(scores, seed=1)
    rng = np.random.default_rng(2)
    wrong = []
    for _ in range(_SPLITS):
        order = rng.permutation(_ROWS)
        calibration, test = order[: _ROWS // 5], order[_ROWS // 5 :]
        threshold = threshold_of(score_EN[:, calibration], agrees_EN[:, calibration], epsilon)
        wrong.append(wrong_share(score_EN[:, test], agrees_EN[:, test], threshold))
    error = float(np.std(wrong) / math.sqrt(_SPLITS))
    assert np.mean(wrong) <= epsilon + 2 * error
    # Not for nothing: of the rows that could go wrong a share near epsilon does.
    could = 1 - agrees_EN.all(axis=0).mean()
    assert np.mean(wrong) >= 0.5 * epsilon * could


def test_scores_that_are_too_sure_of_themselves_change_nothing_but_the_threshold() -> None:
    """What calibration is for: a threshold of 1 - epsilon promises nothing."""
    score_EN, agrees_EN = world("random")
    sure_EN = score_EN**0.1
    assert wrong_share(sure_EN, agrees_EN, 1 - 0.1) > 0.2
    exits = exit_of(score_EN, threshold_of(score_EN, agrees_EN, 0.1))
    assert np.array_equal(exit_of(sure_EN, threshold_of(sure_EN, agrees_EN, 0.1)), exits)


# Through calibration


def recorded(task: TaskSpec, seed: int = 0, rows: int = 600) -> Scorer:
    """A scorer of a made-up recording of a cats model with E early exits."""
    score_EN, agrees_EN = world("good", seed, rows)
    rng = np.random.default_rng(seed)
    full_N = rng.integers(0, 3, rows)
    outputs: dict[int, dict[str, torch.Tensor]] = {}
    for depth in range(1, E + 2):
        if task.labels:
            chosen_N = (
                full_N if depth > E else np.where(agrees_EN[depth - 1], full_N, (full_N + 1) % 3)
            )
            answer_NC = np.eye(3, dtype=np.float32)[chosen_N] * 3
        else:
            off_N = 0.0 if depth > E else np.where(agrees_EN[depth - 1], 0.4, 0.6)
            answer_NC = (full_N + off_N).astype(np.float32)[:, None]
        outputs[depth] = {"logits": torch.from_numpy(answer_NC)}
        if depth <= E:
            outputs[depth]["score"] = torch.from_numpy(score_EN[depth - 1].astype(np.float32))
    spec = HeadSpec(task, 8, E + 1, tuple(range(1, E + 2)), METHODS["cats"].settings)
    return Scorer(
        METHODS["cats"].policy(spec),
        Recording(outputs, np.full(rows, 5), E + 1),
        METHODS["cats"].knobs(spec),
        task,
        metric_of(task)[1],
        full_N.astype(np.float32),
        np.ones(rows),
    )


@pytest.mark.parametrize("task", [CLASSES, NUMBER], ids=lambda task: task.kind)
def test_calibration_by_risk_gives_one_threshold_and_says_what_it_rests_on(task: TaskSpec) -> None:
    scorer = recorded(task)
    point = calibrate(scorer, Goal(epsilon=0.1))
    (threshold,) = set(point.knobs["threshold"])
    score_EN, agrees_EN = scores_and_agreement(scorer.policy, scorer.recording)  # type: ignore[arg-type]
    assert threshold == threshold_of(score_EN, agrees_EN, 0.1)
    inconsistent = int((~agrees_EN.all(axis=0)).sum())
    assert point.guarantee == Guarantee(0.1, 600, inconsistent)
    assert point.score.mean_depth < E + 1
    # A replay of the real policy goes wrong on at most a tenth of the rows that could.
    depth_N, answer_NC = replay(scorer.policy, scorer.recording, point.knobs)
    full_NC = scorer.recording.outputs[E + 1]["logits"].numpy()
    far = np.abs(answer_NC - full_NC).max(axis=1) > 0.5
    assert far.sum() <= 0.1 * inconsistent
    assert point.score.mean_depth == pytest.approx(depth_N.mean())
    assert calibrate(scorer, Goal(epsilon=0.0)).knobs["threshold"] == (1.0,) * (E + 1)


def test_a_row_whose_scores_are_no_numbers_cannot_go_wrong() -> None:
    scorer = recorded(CLASSES)
    for depth in range(1, E + 1):
        scorer.recording.outputs[depth]["score"][:] = math.nan
    assert calibrate(scorer, Goal(epsilon=0.5)).score.mean_depth == E + 1


def test_label_weights_and_other_methods_have_no_guarantee() -> None:
    scorer = recorded(CLASSES)
    scorer.weight_N[3] = 2.0
    with pytest.raises(ConfigError, match="label weights do not go with a guarantee"):
        calibrate(scorer, Goal(epsilon=0.1))
    spec = HeadSpec(CLASSES, 8, E + 1, tuple(range(1, E + 2)))
    scorer.policy = METHODS["deebert"].policy(spec)
    with pytest.raises(ConfigError, match="this exit method offers no guarantee"):
        calibrate(scorer, Goal(epsilon=0.1))


def test_a_goal_is_exactly_one_of_three_and_a_risk_is_below_one() -> None:
    both: tuple[dict[str, Any], ...] = ({"max_drop": 1.0}, {"mean_depth": 2.0})
    for given in ({}, *({**goal, "epsilon": 0.1} for goal in both)):
        with pytest.raises(ConfigError, match="give one of --max-drop, --mean-depth and --epsilon"):
            Goal(**given)
    for risk in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="at least 0 and below 1"):
            Goal(epsilon=risk)


# Settings


def test_the_recipes_risk_is_for_methods_that_offer_a_guarantee() -> None:
    assert resolve_config({"method": "cats"}, where="x").calibration.epsilon == 0.1
    other = resolve_config({"method": "deebert", "recipe": "cats"}, where="x")
    assert other.calibration.epsilon == 0.0
    drop = {"method": "cats", "calibration": {"max_drop": 0.5}}
    assert resolve_config(drop, where="x").calibration.epsilon == 0.0
    both = {"method": "cats", "calibration": {"max_drop": 0.5, "epsilon": 0.05}}
    assert resolve_config(both, where="x").calibration.epsilon == 0.05


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"method": "deebert"}, "epsilon: deebert offers no guarantee; methods that do: cats"),
        ({"method": "cats", "training": {"keep": "best"}}, "keep = 'best' does not leave them so"),
        ({"method": "cats", "recipe": "pabee"}, "keep = 'best' does not leave them so"),
        ({"method": "cats", "calibration": {"shift_label": "oos"}}, "shift_label does not leave"),
        ({"method": "cats", "calibration": {"label_weights": {"oos": 2.0}}}, "label_weights does"),
    ],
)
def test_a_guarantee_that_cannot_be_kept_is_refused(table: dict[str, object], says: str) -> None:
    calibration = {"epsilon": 0.1, **dict(table.get("calibration", {}))}  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match=says):
        resolve_config({**table, "calibration": calibration}, where="f.toml")


# On record


def test_what_is_promised_is_on_record_by_precision_until_another_goal_takes_its_place() -> None:
    fp32, int8 = Guarantee(0.1, 500, 60), Guarantee(0.1, 500, 62)
    first = on_record({"seconds": 3}, {"fp32": fp32, "int8": int8}, "dev")
    assert first["guarantee"]["int8"] == {
        "epsilon": 0.1,
        "rows": 500,
        "inconsistent": 62,
        "data": "dev",
    }
    second = on_record(first, {"int8": None}, "dev.tsv")
    assert second == on_record({"seconds": 3}, {"fp32": fp32}, "dev")
    assert on_record(second, {"fp32": None}, "dev.tsv") == {"seconds": 3}
    text = sentences_of(first, "the same class")
    assert "int8: with probability 0.9 at least the answer agrees with the full model's" in text
    assert "(the same class); calibrated on 500 rows (dev), 62 of them" in text
    assert "not about accuracy" in text
    assert sentences_of({"seconds": 3}, "the same class") == ""


def test_people_are_told_when_the_rows_are_too_few() -> None:
    enough = Guarantee(0.1, 500, 60)
    assert enough.sentence().endswith("(60 have an early exit that disagrees)")
    few = replace(enough, inconsistent=9).sentence()
    assert "too few for anybody to leave early, 10 would be needed" in few
