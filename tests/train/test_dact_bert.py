"""DACT-BERT's recipe: the mixture that is trained is the one that is given out, and what each stage moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from law import whole
from passes import make_pass, random_batch
from seen import VALUES, seen
from tiny_checkpoint import make_checkpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from toy_models import toy_model

from offramp_common.activations import Activations
from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec, never_exit
from offramp_model.backbones import backbone_from_pretrained
from offramp_model.exits import HeadSpec, State
from offramp_model.methods import METHODS
from offramp_model.methods.dact_bert import MixturePolicy
from offramp_model.split_model import MultiExitModel, TorchLayers
from offramp_train.batches import Example
from offramp_train.exit_answers import exit_answers
from offramp_train.recipe_check import check_recipe, start_heads
from offramp_train.recipes import RECIPES
from offramp_train.recipes.dact_bert import RECIPE, mixture, mixture_loss

TARGET = torch.tensor([0, 2, 1, 1, 0])
LABELS = TaskSpec("classification", ("a", "b", "c"))


def _outputs(width: int = 3) -> dict[int, dict[str, Tensor]]:
    torch.manual_seed(1)
    return {
        depth: {
            "logits": torch.randn(5, width, requires_grad=True),
            "go_on": torch.randn(5, requires_grad=True),
        }
        for depth in (1, 2, 4)
    }


@pytest.mark.parametrize("regression", [False, True])
def test_the_mixture_that_is_trained_is_the_policys_at_full_depth(regression: bool) -> None:
    width = 1 if regression else 3
    outputs, task = _outputs(width), VALUES if regression else LABELS
    a_BC, share_NB, weight_NB = mixture(seen(outputs, TARGET, RECIPE, task=task))
    policy = MixturePolicy((1, 2, 4), width, regression)
    state: State = policy.start(torch.ones(5, 1, dtype=torch.bool))
    knobs = {"slack": torch.tensor(2.0), "tolerance": torch.tensor(0.0)}
    for i, depth in enumerate((1, 2, 4)):
        state = policy.decide(outputs[depth], state, knobs, depth).state
        assert torch.equal(share_NB[i], outputs[depth]["go_on"].sigmoid())
        assert torch.equal(weight_NB[i], state["p"])
    assert torch.equal(a_BC, state["a"])


@pytest.mark.parametrize("reg", ["h", "p"])
def test_the_loss_is_the_log_of_a_probability_and_tau_times_the_sum_of_shares_or_weights(
    reg: str,
) -> None:
    # Two exits: y_1 = (0.8, 0.2), h_1 = 0.5, y_2 = (0.4, 0.6), h_2 = 0.25: a_2 = (0.6, 0.4).
    outputs = {
        1: {"logits": torch.tensor([[0.8, 0.2]]).log(), "go_on": torch.tensor([0.0])},
        2: {"logits": torch.tensor([[0.4, 0.6]]).log(), "go_on": torch.tensor([3.0]).log().neg()},
    }
    loss = mixture_loss(seen(outputs, torch.tensor([0]), RECIPE, tau=0.1, reg=reg))
    counted = 0.5 + 0.25 if reg == "h" else 0.5 + 0.5 * 0.25
    assert torch.allclose(loss, -torch.tensor(0.6).log() + 0.1 * counted)


def test_a_values_loss_is_the_squared_error_of_the_mixture() -> None:
    target = torch.tensor([0.5, 1.0, -1.0, 2.0, 0.0])
    mine = seen(_outputs(1), target, RECIPE, task=VALUES, tau=0.0)
    a_BC, _, _ = mixture(mine)
    assert torch.allclose(mixture_loss(mine), ((a_BC[:, 0] - target) ** 2).mean())


def test_shares_of_one_train_the_last_exit_alone() -> None:
    outputs = _outputs()
    for named in outputs.values():
        named["go_on"] = torch.full((5,), 1e4)
    loss = mixture_loss(seen(outputs, TARGET, RECIPE, tau=0.0))
    assert torch.allclose(loss, cross_entropy(outputs[4]["logits"], TARGET))


def test_row_weights_count_in_all_of_it() -> None:
    outputs, weight = _outputs(), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    first = {d: {n: v[:3] for n, v in named.items()} for d, named in outputs.items()}
    whole = mixture_loss(seen(outputs, TARGET, RECIPE, weight_B=weight))
    assert torch.allclose(whole, mixture_loss(seen(first, TARGET[:3], RECIPE)))


def test_more_tau_makes_shares_smaller() -> None:
    """Trained on the same exits, which agree with the label ever more: the weight left after the first."""
    left = []
    for tau in (5e-5, 5e-3, 5e-1):
        go_on_N = [torch.full((1,), 2.0, requires_grad=True) for _ in range(3)]
        optimiser = torch.optim.Adam(go_on_N, lr=0.1)
        for _ in range(50):
            optimiser.zero_grad()
            outputs = {
                depth: {"logits": torch.tensor([[float(depth), 0.0, 0.0]]), "go_on": go_on}
                for depth, go_on in enumerate(go_on_N, start=1)
            }
            loss = mixture_loss(seen(outputs, torch.tensor([0]), RECIPE, tau=tau))
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        left.append(go_on_N[0].sigmoid().item())
    assert left[0] > left[1] > left[2]
    assert left[0] > 0.9, "hardly priced: the better answers to come have their weight"
    assert left[2] < 0.5


def _moved(model: MultiExitModel) -> set[str]:
    return {
        name
        for name, p in model.exits.named_parameters()
        if p.grad is not None and bool((p.grad != 0).any())
    }


def test_the_first_stage_moves_no_share_and_no_early_exit_and_the_second_all() -> None:
    parts = ("classifier.weight", "classifier.bias", "go_on.weight", "go_on.bias")
    every = {f"{depth}.{part}" for depth in (1, 2, 3) for part in parts}
    model = toy_model("dact_bert", task=TaskSpec("classification", tuple("abcde")))
    first, second = RECIPE.stages
    assert (first.trains, second.trains) == ("backbone+final", "all")
    first.gradients(make_pass(model, RECIPE, [random_batch(1)]))
    assert _moved(model) == {"3.classifier.weight", "3.classifier.bias"}
    second.gradients(make_pass(model, RECIPE, [random_batch(1)]))
    assert _moved(model) == every


def test_fresh_heads_keep_the_bias_that_lets_deep_exits_learn(tmp_path: Path) -> None:
    backbone = backbone_from_pretrained(str(make_checkpoint(tmp_path)))
    spec = HeadSpec(LABELS, backbone.width, 3, (1, 2, 3), METHODS["dact_bert"].settings)
    model = MultiExitModel(backbone, METHODS["dact_bert"], spec)
    start_heads(model, "auto")
    for head in model.exits.values():
        assert head.get_parameter("go_on.bias").item() == 2.0
        assert head.get_parameter("go_on.weight").std() < 0.04
        assert head.get_parameter("classifier.weight").std() < 0.04


def test_the_quality_of_an_exit_is_that_of_the_mixture_it_gives_out() -> None:
    model = toy_model("dact_bert", seed=2)
    batch = random_batch(1, rows=40)
    examples = [
        Example(tuple(ids), (0,) * len(ids), target)
        for ids, target in zip(
            batch.inputs_BTF[:, :, 0].tolist(), batch.target_B.tolist(), strict=True
        )
    ]
    answers, target_N = exit_answers(model, examples)
    assert target_N.tolist() == batch.target_B.tolist(), "rows of one length keep their order"
    lengths_B = np.full(40, 10)
    acts = Activations(batch.inputs_BTF.numpy(), lengths_B, depth=0)
    got = whole(TorchLayers(model), acts, never_exit(model.knobs, 3))
    # Other code paths (padded or not) sum float32 in another order.
    np.testing.assert_allclose(answers[3], got.answers, rtol=0, atol=1e-4)
    with torch.no_grad():
        own = model(batch.inputs_BTF, batch.mask_BT)[3]["logits"].log_softmax(dim=-1)
    assert np.abs(answers[3] - own.numpy()).max() > 0.1, "the last exit's own answer is another"


def test_it_fits_its_own_method_alone() -> None:
    method = METHODS["dact_bert"]
    for task in (LABELS, VALUES):
        check_recipe(RECIPE, method, task, method.settings)
    with pytest.raises(ConfigError, match="would leave dact_bert's 'go_on' untrained"):
        check_recipe(RECIPES["pabee"], method, LABELS, method.settings)
    with pytest.raises(ConfigError, match="trains the exits' 'go_on', which pabee does not have"):
        check_recipe(RECIPE, METHODS["pabee"], LABELS, METHODS["pabee"].settings)
