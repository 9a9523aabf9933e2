"""The recipe of ensemble internal classifiers: diversity in the wrong classes, and in them alone."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from seen import seen
from tiny_checkpoint import make_checkpoint, write_topics
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainers import make_trainer, small_config

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.methods import METHODS
from offramp_train.data import read_splits
from offramp_train.exit_answers import exit_answers
from offramp_train.recipe_check import check_recipe
from offramp_train.recipes.ensemble_ic import (
    RECIPE,
    accurate_and_diverse,
    diversity,
    log_wrong,
)

TARGET = torch.tensor([0, 2, 1, 1, 0])


def _answers(n_classes: int = 3, seed: int = 1) -> dict[int, Tensor]:
    torch.manual_seed(seed)
    return {depth: torch.randn(5, n_classes, requires_grad=True) for depth in (1, 2, 3)}


def test_with_beta_zero_the_loss_is_the_plain_sum_of_the_exits() -> None:
    answers = _answers()
    by_hand = torch.stack([cross_entropy(answer, TARGET) for answer in answers.values()]).sum()
    assert torch.allclose(accurate_and_diverse(seen(answers, TARGET, RECIPE, beta=0.0)), by_hand)
    rewarded = accurate_and_diverse(seen(answers, TARGET, RECIPE, beta=0.5))
    assert torch.allclose(rewarded, by_hand - 0.5 * diversity(seen(answers, TARGET)))


def test_the_wrong_classes_are_scaled_to_sum_to_one_without_the_gold_one() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]]).log()
    got = log_wrong(logits, torch.tensor([1, 0])).exp()
    torch.testing.assert_close(got, torch.tensor([[0.4, 0.6], [1 / 3, 2 / 3]]))


def test_diversity_is_the_distance_from_the_nearest_earlier_exit() -> None:
    # Gold is class 0, q is set by the other two: (1/2, 1/2), (1/4, 3/4), (3/4, 1/4).
    q = {1: (0.5, 0.5), 2: (0.25, 0.75), 3: (0.75, 0.25)}
    answers = {d: torch.tensor([[0.6, 0.4 * a, 0.4 * b]]).log() for d, (a, b) in q.items()}

    def distance(j: int, i: int) -> float:
        return -sum(p * math.log(r) for p, r in zip(q[j], q[i], strict=True))

    by_hand = distance(1, 2) + min(distance(1, 3), distance(2, 3))
    assert distance(1, 3) < distance(2, 3), "not the exit just before"
    got = diversity(seen(answers, torch.tensor([0]))).item()
    assert got == pytest.approx(by_hand, abs=1e-6)


def test_what_an_exit_says_of_the_gold_class_does_not_count() -> None:
    answers = _answers()
    one_hot = torch.nn.functional.one_hot(TARGET, 3)
    moved = {depth: answer + 2.0 * depth * one_hot for depth, answer in answers.items()}
    torch.testing.assert_close(diversity(seen(moved, TARGET)), diversity(seen(answers, TARGET)))
    diversity(seen(answers, TARGET)).backward()  # type: ignore[no-untyped-call]
    for answer in (answers[2], answers[3]):
        assert answer.grad is not None
        assert (answer.grad.gather(1, TARGET[:, None]) == 0).all()
        assert (answer.grad != 0).any()


def test_an_exit_is_pushed_away_from_earlier_ones_which_stay() -> None:
    answers = {d: a for d, a in _answers().items() if d < 3}
    diversity(seen(answers, TARGET)).backward()  # type: ignore[no-untyped-call]
    assert answers[1].grad is None, "it is only ever the earlier one, and that is fixed"
    assert answers[2].grad is not None


def test_the_reward_is_bounded() -> None:
    first = torch.tensor([[0.0, 0.0, -50.0]])
    second = torch.tensor([[0.0, -500.0, 0.0]], requires_grad=True)
    got = diversity(seen({1: first, 2: second}, torch.tensor([0])))
    assert got.item() == pytest.approx(2 * math.log(2))
    got.backward()  # type: ignore[no-untyped-call]
    assert second.grad is not None
    assert (second.grad == 0).all(), "nothing more to be earned"


def test_with_two_classes_there_is_one_way_to_be_wrong_and_no_diversity() -> None:
    task = TaskSpec("classification", ("no", "yes"))
    answers, target = _answers(n_classes=2), torch.tensor([0, 1, 1, 1, 0])
    assert diversity(seen(answers, target, task=task)).item() == 0.0
    plain, rewarded = (
        accurate_and_diverse(seen(answers, target, RECIPE, task=task, beta=beta))
        for beta in (0.0, 0.5)
    )
    assert torch.equal(plain, rewarded)


def test_row_weights_count_in_both_terms() -> None:
    answers, weight = _answers(), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    first = {depth: answer[:3] for depth, answer in answers.items()}
    whole = accurate_and_diverse(seen(answers, TARGET, RECIPE, weight_B=weight))
    assert torch.allclose(whole, accurate_and_diverse(seen(first, TARGET[:3], RECIPE)))


def test_it_trains_any_classifier_and_no_regression() -> None:
    task = TaskSpec("classification", ("a", "b", "c"))
    for method in ("ensemble_ic", "pabee", "deebert"):
        check_recipe(RECIPE, METHODS[method], task, METHODS[method].settings)
    with pytest.raises(ConfigError, match="has no loss for regression"):
        check_recipe(RECIPE, METHODS["pabee"], TaskSpec("regression"), METHODS["pabee"].settings)


def _trained(folder: Path, beta: float) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """(answers of each exit on dev, targets) after training by the recipe."""
    splits = read_splits(write_topics(folder / "data"))
    checkpoint = make_checkpoint(folder / "checkpoint")
    config = small_config(method="ensemble_ic", loss={"beta": beta}, training={"epochs": 12})
    trainer = make_trainer(config, splits, checkpoint, folder / "work")
    trainer.fit()
    return exit_answers(trainer.model, trainer.dev)


@pytest.mark.slow
def test_exits_come_to_disagree_on_wrong_classes_and_stay_as_accurate(tmp_path: Path) -> None:
    apart, accuracy = [], []
    for beta in (0.0, 0.5):
        answers, target_N = _trained(tmp_path / str(beta), beta)
        log_q = [
            log_wrong(torch.from_numpy(a), torch.from_numpy(target_N)) for a in answers.values()
        ]
        pairs = itertools.combinations(log_q, 2)
        # Total variation between what two exits say of the wrong classes.
        apart.append(np.mean([0.5 * (a.exp() - b.exp()).abs().sum(-1).mean() for a, b in pairs]))
        accuracy.append([float((a.argmax(1) == target_N).mean()) for a in answers.values()])
    assert apart[1] > 2 * apart[0], apart
    # 60 rows: a point is less than one of them.
    assert min(np.subtract(accuracy[1], accuracy[0])) >= -0.017, accuracy
