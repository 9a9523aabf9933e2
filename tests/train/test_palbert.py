"""PALBERT's recipe: chances that add up, the prior, and the direction of its distance."""

from __future__ import annotations

import math

import pytest
import torch
from passes import make_pass, random_batch
from seen import VALUES, seen
from torch import Tensor
from torch.nn.functional import cross_entropy
from toy_models import toy_model

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.methods import METHODS
from offramp_train.recipe_check import check_recipe, loss_settings
from offramp_train.recipes import RECIPES
from offramp_train.recipes.palbert import RECIPE, log_chances, log_prior, ponder_loss

TARGET = torch.tensor([0, 2, 1, 1, 0])
LABELS = TaskSpec("classification", ("a", "b", "c"))


def _outputs(width: int = 3, exits: tuple[int, ...] = (1, 2, 4)) -> dict[int, dict[str, Tensor]]:
    torch.manual_seed(1)
    return {
        depth: {
            "logits": torch.randn(5, width, requires_grad=True),
            "stop": torch.randn(5, requires_grad=True),
        }
        for depth in exits
    }


def test_the_chances_are_those_of_stopping_and_the_last_takes_what_is_left() -> None:
    outputs = _outputs()
    p_NB = log_chances(seen(outputs, TARGET, RECIPE)).exp()
    one, two, _ = (named["stop"].sigmoid() for named in outputs.values())
    by_hand = torch.stack([one, two * (1 - one), (1 - one) * (1 - two)])
    assert torch.allclose(p_NB, by_hand)
    assert (p_NB >= 0).all()
    # Before the last exit the sum is 1 - prod(1 - lambda), with it 1.
    assert torch.allclose(p_NB[:2].sum(dim=0), 1 - (1 - one) * (1 - two))
    assert torch.allclose(p_NB.sum(dim=0), torch.ones(5))


def test_the_prior_is_geometric_over_the_exits_there_are_and_adds_up_to_one() -> None:
    g_N = log_prior(0.1, 4).exp()
    assert torch.allclose(g_N, torch.tensor([0.1, 0.09, 0.081, 0.729]))
    for n in (1, 2, 12):
        assert torch.allclose(log_prior(0.3, n).exp().sum(), torch.tensor(1.0))


def test_the_loss_is_the_expected_one_and_beta_times_the_sum_of_g_log_g_over_p() -> None:
    mine = seen(_outputs(), TARGET, RECIPE, beta=0.7, prior=0.2)
    p_NB = log_chances(mine).exp()
    loss_NB = torch.stack(
        [cross_entropy(a, TARGET, reduction="none") for a in mine.answers.values()]
    )
    g_N1 = torch.tensor([[0.2], [0.16], [0.64]])
    kl_B = (g_N1 * (g_N1 / p_NB).log()).sum(dim=0)
    assert torch.allclose(ponder_loss(mine), ((p_NB * loss_NB).sum(dim=0) + 0.7 * kl_B).mean())
    other_B = (p_NB * (p_NB / g_N1).log()).sum(dim=0)
    assert not torch.allclose(kl_B, other_B, rtol=0.1), "the directions must differ here"


def test_a_values_loss_is_the_expected_squared_error() -> None:
    target = torch.tensor([0.5, 1.0, -1.0, 2.0, 0.0])
    mine = seen(_outputs(1), target, RECIPE, task=VALUES, beta=0.0)
    error_NB = torch.stack([(a[:, 0] - target) ** 2 for a in mine.answers.values()])
    expected = (log_chances(mine).exp() * error_NB).sum(dim=0).mean()
    assert torch.allclose(ponder_loss(mine), expected)


def test_chances_drawn_to_the_prior_become_it() -> None:
    """Where exits are equally good, the distance alone is left; at its least it is 0."""
    stop_N = [torch.zeros(1, requires_grad=True) for _ in range(4)]
    optimiser = torch.optim.Adam(stop_N, lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        outputs = {
            depth: {"logits": torch.zeros(1, 3), "stop": stop}
            for depth, stop in enumerate(stop_N, start=1)
        }
        mine = seen(outputs, torch.tensor([0]), RECIPE, prior=0.3)
        loss = ponder_loss(mine)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert loss.item() == pytest.approx(math.log(3), abs=1e-4), "the labels' loss, and no distance"
    p_N = log_chances(mine).exp()[:, 0].detach()
    assert torch.allclose(p_N, log_prior(0.3, 4).exp(), atol=1e-3)


def test_the_last_exits_own_chance_is_not_asked_for() -> None:
    outputs = _outputs()
    ponder_loss(seen(outputs, TARGET, RECIPE)).backward()  # type: ignore[no-untyped-call]
    gradients = [named["stop"].grad for named in outputs.values()]
    assert [g is not None and bool((g != 0).any()) for g in gradients] == [True, True, False]


@pytest.mark.parametrize("stop", [-1e3, 1e3])
def test_certain_chances_leave_loss_and_gradients_finite(stop: float) -> None:
    outputs = _outputs()
    for named in outputs.values():
        named["stop"] = torch.full((5,), stop, requires_grad=True)
    loss = ponder_loss(seen(outputs, TARGET, RECIPE))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    for depth in (1, 2):
        for name in ("logits", "stop"):
            gradient = outputs[depth][name].grad
            assert gradient is not None
            assert gradient.isfinite().all()


def test_row_weights_count_in_all_of_it() -> None:
    outputs, weight = _outputs(), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    first = {d: {n: v[:3] for n, v in named.items()} for d, named in outputs.items()}
    whole = ponder_loss(seen(outputs, TARGET, RECIPE, weight_B=weight))
    assert torch.allclose(whole, ponder_loss(seen(first, TARGET[:3], RECIPE)))


def test_the_lambda_heads_gradient_reaches_the_backbone() -> None:
    model = toy_model("palbert", task=TaskSpec("classification", tuple("abcde")))
    with torch.no_grad():
        model.exits["1"].get_parameter("classifier.weight").zero_()
    work = make_pass(model, RECIPE, [random_batch(1)], beta=1.0)
    RECIPE.stages[0].gradients(work)
    # With a classifier of zeros the backbone moves for the lambda head alone.
    query = model.backbone.get_parameter("layers.0.attention.self.query.weight")
    assert query.grad is not None
    assert (query.grad != 0).any()


def test_a_prior_that_is_no_chance_is_refused() -> None:
    for bad in (0.0, 1.0):
        with pytest.raises(ConfigError, match=r"loss\.prior = .*: must be a number from 0\.001"):
            loss_settings(RECIPE, {"prior": bad}, "f.toml")


def test_it_fits_its_own_method_alone() -> None:
    method = METHODS["palbert"]
    for task in (LABELS, VALUES):
        check_recipe(RECIPE, method, task, method.settings)
    with pytest.raises(ConfigError, match=r"would leave palbert's 'stop' untrained.*: palbert"):
        check_recipe(RECIPES["pabee"], method, LABELS, method.settings)
    with pytest.raises(ConfigError, match="trains the exits' 'stop', which pabee does not have"):
        check_recipe(RECIPE, METHODS["pabee"], LABELS, METHODS["pabee"].settings)
