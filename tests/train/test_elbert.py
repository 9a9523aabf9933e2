"""ELBERT's recipe: weights of losses that are learned and always sum to the number of exits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from seen import CLASSES, seen
from tiny_checkpoint import make_checkpoint, write_topics
from torch import Tensor
from torch.nn.functional import cross_entropy
from toy_models import toy_model
from trainers import assert_stops_leave_no_trace, make_trainer, small_config

from offramp_common.errors import ConfigError
from offramp_train.data import Splits, read_splits
from offramp_train.recipe_check import check_model
from offramp_train.recipes import RECIPES
from offramp_train.recipes.elbert import RECIPE, LossWeights, weighted
from offramp_train.recipes.recipe import Pass

TARGET = torch.tensor([0, 2, 1, 1, 0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return read_splits(write_topics(tmp_path_factory.mktemp("topics")))


def _answers() -> dict[int, Tensor]:
    torch.manual_seed(1)
    return {depth: torch.randn(5, 3) for depth in (1, 2, 3)}


def test_weights_start_near_one_and_the_last_makes_up_what_the_others_lack() -> None:
    weights = LossWeights(4)()
    torch.testing.assert_close(weights, torch.tensor([0.98201] * 3 + [4 - 3 * 0.98201]))


def test_the_loss_is_the_sum_of_the_exits_losses_times_their_weights() -> None:
    answers, extra = _answers(), LossWeights(3)
    with torch.no_grad():
        extra.a.copy_(torch.tensor([0.0, 1.0]))
    one, two, three = (cross_entropy(answer, TARGET) for answer in answers.values())
    second = torch.sigmoid(torch.tensor(1.0))
    by_hand = 0.5 * one + second * two + (3 - 0.5 - second) * three
    assert torch.allclose(weighted(seen(answers, TARGET, RECIPE, extra=extra)), by_hand)
    equal = weighted(seen(answers, TARGET, RECIPE, extra=extra, weights="equal"))
    assert torch.allclose(equal, one + two + three)


def test_an_exit_that_does_worse_than_the_last_loses_weight_to_it() -> None:
    worse, better, last = (
        torch.tensor([[s, 0.0, 0.0]]) for s in (-1.0, 2.0, 0.5)
    )  # fmt: skip
    extra, target = LossWeights(3), torch.tensor([0])
    weighted(seen({1: worse, 2: better, 3: last}, target, RECIPE, extra=extra)).backward()  # type: ignore[no-untyped-call]
    assert extra.a.grad is not None
    assert extra.a.grad[0] > 0, "descent lowers it"
    assert extra.a.grad[1] < 0


def test_with_nothing_left_for_the_others_the_last_weight_is_the_number_of_exits() -> None:
    extra = LossWeights(5)
    with torch.no_grad():
        extra.a.fill_(-1e9)
    assert extra().tolist() == [0.0, 0.0, 0.0, 0.0, 5.0]


@pytest.mark.parametrize("weights", ["learned", "equal"])
def test_weights_sum_to_the_number_of_exits_in_every_update_and_move_when_learned(
    weights: str, splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    seen_weights: list[Tensor] = []

    def gradients(work: Pass) -> float:
        assert work.extra is not None
        seen_weights.append(work.extra().detach())
        return RECIPE.stages[0].gradients(work)

    recipe = replace(RECIPE, stages=(replace(RECIPE.stages[0], gradients=gradients),))
    config = small_config(method="elbert", loss={"weights": weights})
    trainer = make_trainer(config, splits, checkpoint, tmp_path, recipe=recipe)
    trainer.fit()
    assert len(seen_weights) == 30
    for weight in seen_weights:
        assert weight.sum().item() == pytest.approx(3.0, abs=1e-6)
    assert torch.equal(seen_weights[0], seen_weights[-1]) == (weights == "equal")
    assert trainer.extra is not None
    a = next(trainer.extra.parameters())
    (group,) = (g for g in trainer.optimiser.param_groups if any(p is a for p in g["params"]))
    assert (group["peak"], group["weight_decay"]) == (1e-2, 0.0), "a rate of its own"


def test_a_stopped_run_goes_on_with_the_weights_it_had(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    config = small_config(method="elbert")
    assert_stops_leave_no_trace(config, (5, 13), splits, checkpoint, tmp_path)


def test_one_head_cannot_be_trained_in_two_stages() -> None:
    model = toy_model("elbert", task=CLASSES)
    with pytest.raises(ConfigError, match="elbert's exits share weights with it"):
        check_model(RECIPES["deebert"], model, {})
    check_model(RECIPE, model, {"weights": "learned"})
