"""Calibration of a method whose exit is chosen for all samples at once: the best fixed exit."""

from __future__ import annotations

import numpy as np
import torch

from offramp_common.spec import TaskSpec
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_train.calibrate import Goal, calibrate, sweep
from offramp_train.metrics import metric_of
from offramp_train.recipe_check import check_recipe
from offramp_train.recipes import RECIPES
from offramp_train.replay import Recording, Scorer

N_LAYERS, ROWS = 12, 1000
EXITS = (1, 3, 7, 12)
WRONG = (388, 193, 171, 154)
"""Rows of 1000 that each exit gets wrong: the paper's on IMDb."""
TASK = TaskSpec("classification", ("negative", "positive"))
METHOD = METHODS["uee_ucb"]
SPEC = HeadSpec(TASK, 8, N_LAYERS, EXITS, METHOD.settings)


def scorer() -> Scorer:
    target_N = np.random.default_rng(0).integers(0, 2, ROWS)
    outputs = {}
    for depth, wrong in zip(EXITS, WRONG, strict=True):
        class_N = np.where(np.arange(ROWS) < wrong, 1 - target_N, target_N)
        outputs[depth] = {"logits": torch.nn.functional.one_hot(torch.tensor(class_N), 2).float()}
    recording = Recording(outputs, np.full(ROWS, 5), N_LAYERS)
    quality = metric_of(TASK)[1]
    return Scorer(
        METHOD.policy(SPEC), recording, METHOD.knobs(SPEC), TASK, quality, target_N, np.ones(ROWS)
    )


def test_calibration_finds_the_shallowest_exit_that_loses_no_more_than_allowed() -> None:
    # Points lost: 23.4, 3.9, 1.7, 0.
    for drop, depth in ((30.0, 1), (4.0, 3), (3.8, 7), (1.6, 12), (0.0, 12)):
        point = calibrate(scorer(), Goal(max_drop=drop))
        assert point.score.mean_depth == depth, drop
        stop = point.knobs["stop"]
        assert len(set(stop)) == 1
        assert stop[0] <= depth


def test_its_curve_is_its_exits() -> None:
    points = {(score.mean_depth, round(1000 * (1 - score.quality))) for _, score in sweep(scorer())}
    assert points == set(zip(map(float, EXITS), WRONG, strict=True))


def test_it_is_trained_as_elasticbert_and_other_joint_recipes_fit_too() -> None:
    assert METHOD.recipe == "elasticbert"
    for recipe in ("elasticbert", "pabee", "deebert"):
        check_recipe(RECIPES[recipe], METHOD, TASK, METHOD.settings)
