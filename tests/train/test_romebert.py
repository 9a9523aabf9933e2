"""RomeBERT's recipe against its sheet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passes import make_pass, random_batch
from seen import VALUES, seen
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from toy_models import toy_model

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.backbones import backbone_from_config
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_train.recipe_check import check_model, check_recipe
from offramp_train.recipes import RECIPES
from offramp_train.recipes.gradients import Gradient, added, inner, learning, two_gradients
from offramp_train.recipes.recipe import Pass, gradients_of
from offramp_train.recipes.romebert import (
    early_matrices,
    exits_loss,
    reference_and_other,
    regularised,
)

RECIPE = RECIPES["romebert"]


def _answers() -> tuple[dict[int, Tensor], Tensor]:
    torch.manual_seed(1)
    answers = {depth: torch.randn(5, 3, requires_grad=True) for depth in (1, 2, 3)}
    return answers, torch.tensor([0, 2, 1, 1, 0])


def _gradient(model: MultiExitModel) -> Gradient:
    return [p.grad for p in learning(model)]


def _work(**settings: Any) -> Pass:
    # With this seed final and early exits conflict over the early matrices, by a cosine of -0.3.
    model = toy_model("romebert", n_layers=4, seed=0)
    return make_pass(model, RECIPE, [random_batch(1)], **settings)


# The sheet's "How to test"


def test_with_gamma_zero_it_is_joint_training_on_the_labels() -> None:
    answers, target = _answers()
    joint = torch.stack([cross_entropy(answers[d], target) for d in (1, 2, 3)]).sum()
    reference, other = reference_and_other(seen(answers, target, RECIPE, gamma=0.0))
    assert other is not None
    torch.testing.assert_close(reference + other, joint)
    work = _work(gamma=0.0, variant="sd")
    regularised(work)
    got = [None if x is None else x.clone() for x in _gradient(work.model)]
    work.model.zero_grad()
    gradients_of(lambda s: torch.stack(list(s.losses().values())).sum())(work)
    for x, y in zip(got, _gradient(work.model), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("reference", ["exits", "final"])
def test_the_update_never_climbs_the_reference_loss(reference: str) -> None:
    """<u, u + v'> >= <u, u> > 0 over the early layers' matrices, where the plain sum falls short of it."""
    work = _work(reference=reference)
    indices = early_matrices(work.model)
    _, u, v = two_gradients(work, reference_and_other)
    chosen_u, chosen_v = [u[i] for i in indices], [v[i] for i in indices]
    least = inner(chosen_u, chosen_u).item()
    assert least > 0
    assert inner(chosen_u, chosen_v).item() < -1e-3, "the losses must conflict to test anything"
    regularised(work)
    left = [_gradient(work.model)[i] for i in indices]
    # Float32: the products are sums of some ten thousand numbers.
    assert inner(chosen_u, left).item() >= least * (1 - 1e-5)


def test_the_final_exit_teaches_and_learns_nothing_from_its_pupils() -> None:
    answers, target = _answers()
    exits_loss(seen(answers, target, RECIPE)).backward()  # type: ignore[no-untyped-call]
    assert answers[3].grad is None
    assert answers[1].grad is not None


# Numbers, and the pitfalls


def test_the_distillation_is_the_mean_over_rows_and_classes_times_gamma_and_t_squared() -> None:
    answers, target = _answers()
    teacher = (answers[3] / 3).softmax(-1)
    expected = torch.zeros(())
    for depth in (1, 2):
        kl_BC = kl_div((answers[depth] / 3).log_softmax(-1), teacher, reduction="none")
        distance = kl_BC.mean()  # over 5 rows and 3 classes
        expected = expected + 0.1 * cross_entropy(answers[depth], target) + 0.9 * 9 * distance
    torch.testing.assert_close(exits_loss(seen(answers, target, RECIPE)), expected)


def test_two_exits_worked_out_by_hand() -> None:
    # A third of their logits (T = 3) gives (1/2, 1/2) and, of the teacher, (3/4, 1/4).
    answers = {1: torch.zeros(1, 2), 2: 3 * torch.tensor([[0.75, 0.25]]).log()}
    task = TaskSpec("classification", ("a", "b"))
    loss = exits_loss(seen(answers, torch.tensor([0]), RECIPE, task=task))
    # 0.1 ln 2, and 0.9 * 9 times the mean over 2 classes of 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812.
    assert loss.item() == pytest.approx(0.0693147 + 8.1 * 0.065406, abs=1e-5)


def test_which_loss_is_the_reference_is_a_setting() -> None:
    answers, target = _answers()
    final, exits = cross_entropy(answers[3], target), exits_loss(seen(answers, target, RECIPE))
    assert not torch.isclose(final, exits)
    for name, expected in (("final", (final, exits)), ("exits", (exits, final))):
        got = reference_and_other(seen(answers, target, RECIPE, reference=name))
        torch.testing.assert_close(got, expected)
    assert RECIPE.settings[1].default == "exits", "the sheet's for all but the largest sets"


def test_only_the_early_layers_matrices_are_projected_and_all_of_them_as_one_vector() -> None:
    work = _work()
    model = work.model
    _, u, v = two_gradients(work, reference_and_other)
    regularised(work)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    early = tuple(f"backbone.layers.{i}." for i in (0, 1, 2))
    matrices = {
        i
        for i, name in enumerate(names)
        if name.startswith(early) and "LayerNorm" not in name and name.endswith("weight")
    }
    assert set(early_matrices(model)) == matrices
    assert len(matrices) == 3 * 6, "query, key, value, output and two of the feed-forward net"
    long_u = torch.cat([x.flatten() for i in sorted(matrices) if (x := u[i]) is not None])
    long_v = torch.cat([x.flatten() for i in sorted(matrices) if (x := v[i]) is not None])
    share = (long_v @ long_u / (long_u @ long_u)).clamp(max=0.0)
    assert share < 0
    for i, (a, b, c) in enumerate(zip(u, v, _gradient(model), strict=True)):
        (plain,) = added([a], [b])
        if i in matrices and a is not None and plain is not None:
            plain = plain - share * a
        torch.testing.assert_close(c, plain, rtol=1e-4, atol=1e-6)


def test_a_matrix_that_layers_share_counts_once() -> None:
    config = {
        "model_type": "albert", "vocab_size": 100, "embedding_size": 8, "hidden_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    spec = HeadSpec(TaskSpec("classification", ("a", "b")), 16, 3, (1, 2, 3), {})
    model = MultiExitModel(backbone_from_config(config), METHODS["romebert"], spec)
    indices = early_matrices(model)
    assert len(indices) == len(set(indices)) == 6
    model.backbone.layers[0].requires_grad_(False)
    assert early_matrices(model) == [], "what does not learn is not projected"


def test_the_variant_without_projection_is_the_plain_sum() -> None:
    work = _work()
    total, u, v = two_gradients(work, reference_and_other)
    plain = _work(variant="sd")
    assert regularised(plain) == pytest.approx(total)
    for x, y in zip(_gradient(plain.model), added(u, v), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)  # float32 sums in another order


def test_micro_batches_are_projected_once_for_the_update() -> None:
    model = toy_model("romebert", n_layers=4, seed=0)
    whole = random_batch(1, rows=8)
    halves = [
        type(whole)(
            whole.inputs_BTF[rows], whole.mask_BT[rows], whole.target_B[rows], whole.weight_B[rows]
        )
        for rows in (slice(0, 4), slice(4, 8))
    ]
    regularised(make_pass(model, RECIPE, [whole]))
    expected = [None if x is None else x.clone() for x in _gradient(model)]
    regularised(make_pass(model, RECIPE, halves))
    for x, y in zip(_gradient(model), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)  # float32 sums in another order


def test_a_lone_exit_and_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="has only the final one"):
        check_model(RECIPE, toy_model("romebert", exits=[3]), {})
    with pytest.raises(ConfigError, match="recipe romebert has no loss for regression"):
        check_recipe(RECIPE, METHODS["pabee"], VALUES, {})
