"""BERxiT's recipe: which exits learn in which update, and that the judge learns who is wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from seen import CLASSES, VALUES, seen
from tiny_checkpoint import make_checkpoint, write_topics
from torch import Tensor
from torch.nn.functional import cross_entropy
from toy_models import toy_model
from trainers import make_trainer, small_config

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Batch
from offramp_train.data import read_splits
from offramp_train.recipe_check import check_model, check_recipe
from offramp_train.recipes import RECIPES
from offramp_train.recipes.berxit import RECIPE, berxit_loss, judged, wrong_targets
from offramp_train.recipes.recipe import Pass, Seen

TARGET = torch.tensor([0, 2, 1, 1, 0])


def _outputs(wrong: bool) -> dict[int, dict[str, Tensor]]:
    torch.manual_seed(1)
    out = {depth: {"logits": torch.randn(5, 3)} for depth in (1, 2, 3)}
    if wrong:
        for named in out.values():
            named["wrong"] = torch.rand(5)
    return out


@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("wrong", [False, True])
def test_updates_alternate_between_the_final_exit_and_all_of_them(step: int, wrong: bool) -> None:
    outputs = _outputs(wrong)
    got = berxit_loss(seen(outputs, TARGET, RECIPE, step=step))
    one, two, three = (cross_entropy(outputs[d]["logits"], TARGET) for d in (1, 2, 3))
    by_hand = three if step % 2 == 0 else one + two
    if not wrong:
        by_hand = three if step % 2 == 0 else one + two + three
    else:
        errors = [
            (o["wrong"] - (o["logits"].argmax(-1) != TARGET).float()) ** 2 for o in outputs.values()
        ]
        by_hand = by_hand + torch.stack(errors).mean()
    assert torch.allclose(got, by_hand)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_joint_variant_adds_up_all_exits_in_every_update(wrong: bool) -> None:
    outputs = _outputs(wrong)
    for step in (0, 1):
        mine = seen(outputs, TARGET, RECIPE, step=step, variant="joint")
        terms = [cross_entropy(o["logits"], TARGET) for o in outputs.values()]
        terms += [judged(mine)] if wrong else []
        assert torch.allclose(berxit_loss(mine), torch.stack(terms).sum())


def test_the_judges_loss_worked_out_by_hand() -> None:
    # Exit 1 is right (target 0) and judged 0.25, exit 2 is wrong (target 1) and judged 0.5.
    outputs = {
        1: {"logits": torch.tensor([[1.0, 0.0, 0.0]]), "wrong": torch.tensor([0.25])},
        2: {"logits": torch.tensor([[0.0, 1.0, 0.0]]), "wrong": torch.tensor([0.5])},
    }
    mine = seen(outputs, torch.tensor([0]), RECIPE)
    assert judged(mine).item() == pytest.approx((0.0625 + 0.25) / 2)
    # tanh(ln 3 / 2) = (3 - 1) / (3 + 1): off by that much, a value is half wrong.
    value = torch.tensor([[1.0 + math.log(3.0) / 2]])
    off = seen({1: value}, torch.tensor([1.0]), RECIPE, task=VALUES)
    assert wrong_targets(off, value).item() == pytest.approx(0.5)


def test_row_weights_count_in_all_of_it() -> None:
    outputs, weight = _outputs(wrong=True), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    first = {d: {n: v[:3] for n, v in named.items()} for d, named in outputs.items()}
    for step in (0, 1):
        whole = berxit_loss(seen(outputs, TARGET, RECIPE, step=step, weight_B=weight))
        assert torch.allclose(whole, berxit_loss(seen(first, TARGET[:3], RECIPE, step=step)))


def test_a_values_target_is_zero_where_the_answer_is_exact_and_stays_below_one() -> None:
    target = torch.tensor([0.5, 0.5, 0.5, 0.5])
    answer = torch.tensor([[0.5], [0.6], [0.4], [5.0]], requires_grad=True)
    got = wrong_targets(seen({1: answer}, target, RECIPE, task=VALUES), answer)
    assert got[0] == 0
    assert torch.allclose(got[1:], torch.tanh(torch.tensor([0.1, 0.1, 4.5])))
    assert ((got >= 0) & (got < 1)).all()
    assert not got.requires_grad


def _gradients(method: str, step: int, **settings: Any) -> MultiExitModel:
    """A model after the gradients of one update."""
    model = toy_model(method, task=CLASSES, settings=settings)
    inputs_BTF = torch.randint(5, 90, (6, 7, 1), generator=torch.Generator().manual_seed(3))
    mask_BT, target_B = torch.ones(6, 7, dtype=torch.bool), torch.tensor([0, 1, 2, 2, 1, 0])
    batch = Batch(inputs_BTF, mask_BT, target_B, torch.ones(6))

    def see(batch: Batch) -> Seen:
        outputs = model(batch.inputs_BTF, batch.mask_BT)
        return seen(outputs, batch.target_B, RECIPE, step=step)

    RECIPE.stages[0].gradients(Pass(model, None, see, [batch], 1e-3))
    return model


def _moved(model: MultiExitModel, depth: int) -> set[str]:
    """The parameters of an exit head that have a gradient other than 0."""
    named = model.exits[str(depth)].named_parameters()
    return {name for name, p in named if p.grad is not None and bool((p.grad != 0).any())}


HEAD = {"pooler.weight", "pooler.bias", "classifier.weight", "classifier.bias"}
JUDGE = {"judge.weight", "judge.bias"}


def test_on_even_updates_early_exits_have_no_gradient_at_all() -> None:
    even, odd = (_gradients("berxit", step, rule="entropy") for step in (0, 1))
    assert [_moved(even, d) for d in (1, 2, 3)] == [set(), set(), HEAD]
    assert [_moved(odd, d) for d in (1, 2, 3)] == [HEAD, HEAD, HEAD]


def test_with_judges_only_theirs_reaches_early_exits_on_even_updates() -> None:
    poolers = {"pooler.weight", "pooler.bias"}  # the judge reads what they give
    even, odd = (_gradients("berxit", step) for step in (0, 1))
    assert [_moved(even, d) for d in (1, 2, 3)] == [JUDGE | poolers, JUDGE | poolers, HEAD | JUDGE]
    assert [_moved(odd, d) for d in (1, 2, 3)] == [HEAD | JUDGE, HEAD | JUDGE, JUDGE | poolers]


def test_the_judges_gradient_reaches_the_backbone() -> None:
    model = toy_model("berxit", task=CLASSES)
    inputs_BTF, mask_BT = torch.full((2, 4, 1), 9), torch.ones(2, 4, dtype=torch.bool)
    judged(seen(model(inputs_BTF, mask_BT), TARGET[:2], RECIPE)).backward()  # type: ignore[no-untyped-call]
    first = model.backbone.get_parameter("layers.0.attention.self.query.weight")
    assert first.grad is not None
    assert (first.grad != 0).any()


def test_updates_are_counted_over_epochs_of_an_odd_number_of_batches(tmp_path: Path) -> None:
    steps: list[int] = []

    def gradients(work: Pass) -> float:
        steps.append(work.see(work.batches[0]).progress.step)
        return RECIPE.stages[0].gradients(work)

    recipe = replace(RECIPE, stages=(replace(RECIPE.stages[0], gradients=gradients),))
    splits = read_splits(write_topics(tmp_path / "data"))
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    config = small_config(method="berxit", training={"batch": 80, "epochs": 3})
    make_trainer(config, splits, checkpoint, tmp_path / "work", recipe=recipe).fit()
    assert steps == list(range(9)), "three epochs of three batches"


# The judge, learned on a frozen toy set: at each exit a row is wrong or right by one number of its vector


def _toy_set(rows: int, seed: int) -> tuple[dict[int, Tensor], Tensor]:
    """(hidden_BTD of each of three exits, target_B): deeper exits are wrong about fewer rows."""
    generator = torch.Generator().manual_seed(seed)
    target_B = torch.randint(0, 3, (rows,), generator=generator)
    hardness_B = torch.rand(rows, generator=generator)
    hidden: dict[int, Tensor] = {}
    for depth, share_right in ((1, 0.3), (2, 0.6), (3, 0.9)):
        over_B = hardness_B - share_right
        shown_B = torch.where(over_B > 0, (target_B + 1) % 3, target_B)
        hidden_BD = 0.1 * torch.randn(rows, 8, generator=generator)
        hidden_BD[:, :3] += torch.nn.functional.one_hot(shown_B, 3)
        hidden_BD[:, 3] = over_B + 0.1 * over_B.sign()  # apart by at least 0.2
        hidden[depth] = hidden_BD.unsqueeze(1)
    return hidden, target_B


@torch.no_grad()
def _frozen_branches() -> torch.nn.ModuleDict:
    """Heads that pass the vector on and read the class off its first three numbers."""
    spec = HeadSpec(CLASSES, 8, 3, (1, 2, 3), METHODS["berxit"].settings, dropout=0.0)
    torch.manual_seed(0)
    branches = METHODS["berxit"].branches(spec)
    for branch in branches.values():
        branch.get_parameter("pooler.weight").copy_(torch.eye(8))
        branch.get_parameter("classifier.weight").copy_(torch.eye(3, 8))
        for name in ("pooler.bias", "classifier.bias"):
            branch.get_parameter(name).zero_()
    return branches


def _auroc(score_B: Tensor, positive_B: Tensor) -> float:
    """The chance that a positive row scores higher than another, ties counting half."""
    above = score_B[positive_B].unsqueeze(1) - score_B[~positive_B].unsqueeze(0)
    return float(((above > 0).float() + 0.5 * (above == 0).float()).mean())


def _look(branches: torch.nn.ModuleDict, hidden: dict[int, Tensor]) -> dict[int, dict[str, Tensor]]:
    mask_BT = torch.ones(len(hidden[1]), 1, dtype=torch.bool)
    return {depth: branches[str(depth)](h, mask_BT, {}) for depth, h in hidden.items()}


def test_a_judge_of_a_separable_toy_set_knows_on_dev_who_is_wrong_at_every_exit() -> None:
    branches = _frozen_branches()
    judge = list(branches["1"].get_submodule("judge").parameters())
    optimiser = torch.optim.Adam(judge, lr=0.05)
    hidden, target_B = _toy_set(300, seed=1)
    for step in range(300):
        optimiser.zero_grad()
        berxit_loss(seen(_look(branches, hidden), target_B, RECIPE, step=step)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    hidden, target_B = _toy_set(200, seed=2)
    with torch.no_grad():
        outputs = _look(branches, hidden)
    for depth, named in outputs.items():
        wrong_B = named["logits"].argmax(-1) != target_B
        assert 0.05 < wrong_B.float().mean() < 0.9, "rows of both kinds, or there is nothing to see"
        assert _auroc(named["wrong"], wrong_B) > 0.99, (depth, "separable: all but the noise")
        assert (named["wrong"][wrong_B] > 0.5).float().mean() > 0.95
        assert (named["wrong"][~wrong_B] < 0.5).float().mean() > 0.95


# Which methods it fits


def test_it_trains_methods_without_a_judge_too_and_others_do_not_train_the_judge() -> None:
    berxit, labels = METHODS["berxit"], TaskSpec("classification", ("a", "b"))
    for task in (labels, VALUES):
        check_recipe(RECIPE, METHODS["pabee"], task, METHODS["pabee"].settings)
        check_recipe(RECIPE, berxit, task, berxit.settings)
    with pytest.raises(ConfigError, match=r"would leave berxit's 'wrong' untrained.*: berxit"):
        check_recipe(RECIPES["pabee"], berxit, labels, berxit.settings)
    check_recipe(RECIPES["pabee"], berxit, labels, {**berxit.settings, "rule": "entropy"})


def test_taking_turns_needs_an_early_exit() -> None:
    model = toy_model("berxit", exits=[3])
    with pytest.raises(ConfigError, match="has only the final one"):
        check_model(RECIPE, model, {"variant": "alternating"})
    check_model(RECIPE, model, {"variant": "joint"})
