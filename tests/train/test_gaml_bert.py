"""GAML-BERT's recipe against its sheet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import make_pass, random_batch
from seen import VALUES, seen
from tiny_checkpoint import FAMILY_CONFIGS, make_checkpoint, write_topics
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from toy_models import toy_model
from trainers import assert_stops_leave_no_trace, make_trainer, small_config, weights_of

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.backbones import backbone_from_pretrained
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_train.data import Splits, read_splits
from offramp_train.recipe_check import check_model, check_recipe
from offramp_train.recipes import RECIPES
from offramp_train.recipes.gaml_bert import (
    gradient_aligned,
    labels_and_mutual,
    mutual_loss,
    parameter_groups,
)
from offramp_train.recipes.gradients import added, inner, learning, two_gradients
from offramp_train.recipes.recipe import depth_weighted, mutual_divergence

RECIPE = RECIPES["gaml_bert"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return read_splits(write_topics(tmp_path_factory.mktemp("topics"), dev=600))


def _answers() -> tuple[dict[int, Tensor], Tensor]:
    torch.manual_seed(1)
    answers = {depth: torch.randn(5, 3, requires_grad=True) for depth in (1, 2, 3)}
    return answers, torch.tensor([0, 2, 1, 1, 0])


# The sheet's "How to test"; the projection itself is in test_gradients.py


@pytest.mark.parametrize("groups", ["model", "layer"])
def test_what_is_applied_of_the_distillation_never_pulls_against_the_labels(groups: str) -> None:
    # With this seed the whole model conflicts, and of the layers some do and some do not.
    model = toy_model("gaml_bert", seed=4)
    work = make_pass(model, RECIPE, [random_batch(1)], epoch=1, groups=groups)
    total, g, k = two_gradients(work, labels_and_mutual)
    assert gradient_aligned(work) == pytest.approx(total)
    applied = [p.grad for p in learning(model)]
    conflicts = []
    for group in parameter_groups(model, groups):
        labels, before = [g[i] for i in group], [k[i] for i in group]
        after = added([applied[i] for i in group], [None if x is None else -x for x in labels])
        conflict = inner(before, labels) < 0
        conflicts.append(bool(conflict))
        size = (inner(labels, labels) * inner(before, before)).sqrt().item()
        if conflict:
            # Float32: k' is a difference of what is applied and g, both longer than it.
            assert abs(inner(after, labels).item()) < 1e-5 * size
            assert inner(after, after) <= inner(before, before)
        else:
            for x, y in zip(after, before, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    assert any(conflicts)
    assert groups == "model" or not all(conflicts)


def test_with_lambda_zero_training_is_plain_joint_training_to_the_bit(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    training = {"keep": "last"}
    ours = small_config(method="gaml_bert", loss={"lambda": 0.0}, training=training)
    plain = small_config(method="gaml_bert", recipe="pabee", training=training)
    a = make_trainer(ours, splits, checkpoint, tmp_path / "a")
    b = make_trainer(plain, splits, checkpoint, tmp_path / "b")
    histories = a.fit(), b.fit()
    assert histories[0] == histories[1]
    expected = weights_of(b)
    assert all(torch.equal(w, expected[name]) for name, w in weights_of(a).items())


def test_the_first_epoch_is_plain_joint_training_and_the_next_is_not(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    ours = make_trainer(small_config(method="gaml_bert"), splits, checkpoint, tmp_path / "a").fit()
    plain = small_config(method="gaml_bert", recipe="pabee")
    joint = make_trainer(plain, splits, checkpoint, tmp_path / "b").fit()
    assert ours[0] == joint[0]
    assert ours[1]["loss"] != joint[1]["loss"]


def test_a_teacher_learns_nothing_from_its_pupil() -> None:
    answers, target = _answers()
    shown = seen(answers, target, RECIPE)
    for i, student in enumerate(answers):
        for j, teacher in enumerate(answers):
            pair = mutual_divergence(shown, 2.0)[i, j]
            got = torch.autograd.grad(pair, list(answers.values()), allow_unused=True)
            for depth, gradient in zip(answers, got, strict=True):
                size = 0.0 if gradient is None else gradient.abs().max().item()
                if depth == student and depth != teacher:
                    assert size > 1e-4
                else:
                    assert size == 0.0


@pytest.mark.slow
def test_most_exits_are_at_least_as_good_as_after_joint_training(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    """Dev accuracy of each exit, mean of 3 seeds, on a toy task that neither learns fully."""

    def accuracy(name: str, **table: Any) -> Tensor:
        rows = []
        for seed in (1, 2, 3):
            training = {"epochs": 4, "keep": "last"}
            config = small_config(method="gaml_bert", seed=seed, training=training, **table)
            trainer = make_trainer(config, splits, checkpoint, tmp_path / f"{name}{seed}")
            rows.append(list(trainer.fit()[-1]["dev_accuracy"].values()))
        return torch.tensor(rows).mean(dim=0)

    joint, ours = accuracy("joint", recipe="pabee"), accuracy("ours", loss={"lambda": 1.0})
    assert 0.5 < joint[0] < joint[-1] < 0.97, "there must be something to gain"
    assert (ours >= joint).sum() >= 2, (ours, joint)
    assert ours.mean() >= joint.mean()


# Numbers, and the pitfalls


def test_the_losses_by_hand() -> None:
    answers, target = _answers()
    settings: dict[str, Any] = {"lambda": 0.7}
    shown = seen(answers, target, RECIPE, epoch=1, **settings)
    expected = torch.zeros(())
    for i, student in answers.items():
        for j, teacher in answers.items():
            if i != j:
                log_p = (student / 2).log_softmax(-1)
                distance = kl_div(log_p, (teacher.detach() / 2).softmax(-1), reduction="batchmean")
                expected = expected + i / 6 * 4 * distance / 2
    torch.testing.assert_close(mutual_loss(shown), expected)
    labels, mutual = labels_and_mutual(shown)
    by_hand = sum(i / 6 * cross_entropy(answers[i], target) for i in answers)
    torch.testing.assert_close(labels, by_hand)
    assert mutual is not None
    torch.testing.assert_close(mutual, 0.7 * expected)
    assert torch.equal(labels, depth_weighted(shown))


def test_two_exits_worked_out_by_hand() -> None:
    # Halved by T = 2 their logits give (1/2, 1/2) and (3/4, 1/4); weights are 1/3 and 2/3.
    answers = {1: torch.zeros(1, 2), 2: 2 * torch.tensor([[0.75, 0.25]]).log()}
    task = TaskSpec("classification", ("a", "b"))
    loss = mutual_loss(seen(answers, torch.tensor([0]), RECIPE, task=task))
    # 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812 of the first from the second; 1/2 ln 2/3 + 1/2 ln 2 = 0.143841.
    assert loss.item() == pytest.approx(4 * (0.130812 / 3 + 2 * 0.143841 / 3), abs=1e-5)


def test_row_weights_count_in_what_exits_teach_each_other() -> None:
    answers, target = _answers()
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    first = {depth: answer[:3] for depth, answer in answers.items()}
    whole = mutual_loss(seen(answers, target, RECIPE, weight_B=weight))
    torch.testing.assert_close(whole, mutual_loss(seen(first, target[:3], RECIPE)))


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_groups_hold_every_parameter_once(family: str, tmp_path: Path) -> None:
    backbone = backbone_from_pretrained(str(make_checkpoint(tmp_path, family, layers=2)))
    spec = HeadSpec(TaskSpec("classification", ("a", "b")), backbone.width, 2, (1, 2), {})
    model = MultiExitModel(backbone, METHODS["gaml_bert"], spec)
    everything = list(range(len(learning(model))))
    assert parameter_groups(model, "model") == [everything]
    by_layer = parameter_groups(model, "layer")
    assert sorted(i for group in by_layer for i in group) == everything
    layers = len({id(layer) for layer in backbone.layers})
    shared = 1 if list(backbone.shared.parameters()) else 0
    assert len(by_layer) == 1 + shared + layers + 2, "embeddings, layers, two exits"
    model.backbone.embeddings.requires_grad_(False)
    assert len(parameter_groups(model, "layer")) == len(by_layer) - 1


def test_a_stopped_run_continues_to_the_same_bits(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    config = small_config(method="gaml_bert", loss={"groups": "layer"})
    small = replace(splits, train=splits.train.take(list(range(96))))
    assert_stops_leave_no_trace(config, (4, 5), small, checkpoint, tmp_path)


def test_a_lone_exit_and_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="has only the final one"):
        check_model(RECIPE, toy_model("gaml_bert", exits=[3]), {})
    with pytest.raises(ConfigError, match="recipe gaml_bert has no loss for regression"):
        check_recipe(RECIPE, METHODS["pabee"], VALUES, {})
    check_recipe(RECIPE, METHODS["deebert"], TaskSpec("classification", ("a", "b")), {})
