"""FastBERT's recipe: a teacher first, then students that copy it without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from seen import seen
from tiny_checkpoint import make_checkpoint, write_topics
from torch import Tensor
from trainers import make_trainer, small_config, weights_of

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.methods import METHODS
from offramp_train.build import resolve_config
from offramp_train.data import read_splits
from offramp_train.recipe_check import check_recipe
from offramp_train.recipes import RECIPES
from offramp_train.recipes.fastbert import taught

LABELS = torch.tensor([0, 2, 1, 1])


def _answers(seed: int = 1) -> dict[int, Tensor]:
    torch.manual_seed(seed)
    return {depth: torch.randn(4, 3, requires_grad=True) for depth in (1, 2, 3)}


# The sheet's "How to test"


def test_the_second_stage_leaves_backbone_and_teacher_as_they_were(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    splits = read_splits(write_topics(tmp_path / "topics"))
    trainer = make_trainer(small_config(method="fastbert"), splits, checkpoint, tmp_path / "work")
    after_first: dict[str, Tensor] = {}
    run_stage = trainer._stage

    def watched(*arguments: Any) -> None:
        run_stage(*arguments)
        if not after_first:
            after_first.update(weights_of(trainer))

    trainer._stage = watched  # type: ignore[method-assign, assignment]
    trainer.fit()
    after = weights_of(trainer)
    changed = {name for name, w in after.items() if not torch.equal(w, after_first[name])}
    students = {name for name in after if name.startswith(("exits.1.", "exits.2."))}
    # A bias of the keys moves all of a row's scores alike, so nothing is to be learned of it.
    assert {n for n in students if not n.endswith("key.bias")} <= changed <= students


def test_the_loss_is_zero_where_students_say_what_the_teacher_says_and_nowhere_else() -> None:
    teacher_BC = _answers()[3].detach()
    shifted_BC = teacher_BC + torch.tensor([[1.0], [-2.0], [0.5], [0.0]])  # the same distributions
    same = taught(seen({1: teacher_BC, 2: shifted_BC, 3: teacher_BC}, LABELS))
    assert same.item() == pytest.approx(0.0, abs=1e-6)
    for row, column in ((0, 0), (3, 2)):
        other_BC = teacher_BC.clone()
        other_BC[row, column] += 0.5
        assert taught(seen({1: other_BC, 2: teacher_BC, 3: teacher_BC}, LABELS)).item() > 1e-3


@torch.no_grad()
def test_a_student_with_the_teachers_weights_on_the_same_features_has_loss_zero(
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    splits = read_splits(write_topics(tmp_path / "topics"))
    trainer = make_trainer(small_config(method="fastbert"), splits, checkpoint, tmp_path / "work")
    heads = trainer.model.eval().exits
    heads["1"].load_state_dict(heads["3"].state_dict())
    hidden_BTD, mask_BT = torch.randn(4, 5, 32), torch.ones(4, 5, dtype=torch.bool)
    logits = {d: heads[str(d)](hidden_BTD, mask_BT, {})["logits"] for d in (1, 2, 3)}
    assert taught(seen({1: logits[1], 3: logits[3]}, LABELS)).item() == 0.0
    assert taught(seen({2: logits[2], 3: logits[3]}, LABELS)).item() > 0.0


# Worked out by hand


def test_the_divergence_is_weighed_by_the_teacher_summed_over_exits_and_meant_over_rows() -> None:
    teacher_BC = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    first_BC = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    second_BC = torch.tensor([[0.75, 0.25], [0.9, 0.1]]).log()
    # 0.75 ln 1.5 + 0.25 ln 0.5 = 0.130812; 0.5 ln(5 / 9) + 0.5 ln 5 = 0.510826. The other way round, as the
    # paper's formula is written, they would be 0.143841 and 0.368064.
    loss = taught(seen({1: first_BC, 2: second_BC, 3: teacher_BC}, torch.tensor([0, 0])))
    assert loss.item() == pytest.approx((0.130812 + 0.0) / 2 + (0.0 + 0.510826) / 2, abs=1e-6)


def test_labels_count_for_nothing_and_the_teacher_learns_nothing() -> None:
    answers = _answers()
    loss = taught(seen(answers, LABELS))
    assert torch.equal(loss, taught(seen(answers, LABELS.flip(0))))
    loss.backward()  # type: ignore[no-untyped-call]
    assert answers[3].grad is None
    for depth in (1, 2):
        expected = (answers[depth].softmax(-1) - answers[3].softmax(-1)) / 4
        torch.testing.assert_close(answers[depth].grad, expected.detach())


# Its settings


def test_students_learn_ten_times_as_fast_for_five_epochs_after_three() -> None:
    config = resolve_config({"method": "fastbert"}, where="x")
    first, second = (config.for_stage(i, 2) for i in (0, 1))
    assert (first.lr, first.epochs) == (2e-5, 3)
    assert (second.lr, second.epochs) == (2e-4, 5)
    assert (first.batch, first.warmup, first.weight_decay, first.keep) == (32, 0.1, 0.01, "best")


def test_one_number_of_the_users_is_for_both_stages() -> None:
    config = resolve_config(
        {"method": "fastbert", "training": {"epochs": 1, "lr": 1e-3}}, where="x"
    )
    assert [config.for_stage(i, 2).epochs for i in (0, 1)] == [1, 1]
    assert [config.for_stage(i, 2).lr for i in (0, 1)] == [1e-3, 1e-3]
    config = resolve_config({"method": "fastbert", "training": {"epochs": 1}}, where="x")
    assert [config.for_stage(i, 2).lr for i in (0, 1)] == [2e-5, 2e-4]


def test_a_regression_has_no_distribution_to_copy() -> None:
    with pytest.raises(ConfigError, match="recipe fastbert has no loss for regression"):
        check_recipe(RECIPES["fastbert"], METHODS["pabee"], TaskSpec("regression"), {})
