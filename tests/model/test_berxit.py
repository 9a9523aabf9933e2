"""BERxiT against its paper and sheet, and on numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from law import Outcome, whole
from subjects import close, inputs
from torch import Tensor
from toy_models import LABELS, mixed_knobs, toy_model, toy_tokenizer

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import Knobs, run
from offramp_common.spec import TaskSpec
from offramp_edge.runtime import OnnxLayers
from offramp_model.exits import Decision, HeadSpec
from offramp_model.export import add_graphs
from offramp_model.methods import METHODS
from offramp_model.methods.berxit import LearnedPolicy
from offramp_model.split_model import MultiExitModel, TorchLayers
from offramp_model.store import About, save_model

N = 5
CLASSES, VALUES = TaskSpec("classification", LABELS), TaskSpec("regression")


@pytest.fixture(scope="module", params=["lte", "entropy", "regression"])
def model(request: pytest.FixtureRequest) -> MultiExitModel:
    if request.param == "regression":
        return toy_model("berxit", n_layers=N, task=VALUES, seed=3)
    return toy_model("berxit", n_layers=N, seed=3, settings={"rule": request.param})


@pytest.fixture(scope="module")
def batch() -> Activations[NumpyArray]:
    return inputs(48)


def at(model: MultiExitModel, value: float) -> Knobs:
    (knob,) = model.knobs
    return {knob.name: (value,) * N}


def outcome(model: MultiExitModel, batch: Activations[NumpyArray], value: float) -> Outcome:
    return whole(TorchLayers(model), batch, at(model, value))


def decide(wrong: list[float], theta: float, logits: Tensor | None = None) -> Decision:
    logits_BC = torch.zeros(len(wrong), 2) if logits is None else logits
    outputs = {"logits": logits_BC, "wrong": torch.tensor(wrong)}
    return LearnedPolicy().decide(outputs, {}, {"theta": torch.tensor(theta)}, 1)


# The sheet's "How to test"


@torch.inference_mode()
def test_at_zero_every_sample_gets_the_full_models_answer_bit_for_bit(
    model: MultiExitModel, batch: Activations[NumpyArray]
) -> None:
    got = outcome(model, batch, 0.0)
    assert (got.depth_B == N).all()
    mask_BT = torch.from_numpy(mask_of(batch.lengths_B))
    full = model(torch.from_numpy(batch.hidden_BTD), mask_BT)[N]["logits"]
    np.testing.assert_array_equal(got.answers, full.numpy())


def test_above_the_highest_value_everyone_leaves_at_the_first_exit(
    model: MultiExitModel, batch: Activations[NumpyArray]
) -> None:
    (knob,) = model.knobs
    assert (outcome(model, batch, knob.high).depth_B == 1).all()


# Its pitfalls


def test_a_low_chance_of_being_wrong_leaves_and_an_equal_one_stays() -> None:
    assert decide([0.1, 0.25, 0.9], theta=0.25).leave_B.tolist() == [True, False, False]


def test_each_exit_may_have_a_theta_of_its_own(batch: Activations[NumpyArray]) -> None:
    model = toy_model("berxit", n_layers=N, seed=3)
    got = whole(TorchLayers(model), batch, {"theta": (0.0, 0.0, 1.01, 0.0, 0.0)})
    assert (got.depth_B == 3).all()


def test_a_single_sample_is_decided_as_in_a_batch(batch: Activations[NumpyArray]) -> None:
    model = toy_model("berxit", n_layers=N, seed=3)
    knobs = mixed_knobs(model)
    together = whole(TorchLayers(model), batch, knobs)
    assert len(set(together.depth_B.tolist())) > 2, "some rows must leave at different exits"
    for row in range(8):
        alone = whole(TorchLayers(model), batch.take(np.array([row])), knobs)
        assert alone.depth_B.tolist() == [together.depth_B[row]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_whose_judge_or_classifier_gives_no_number_stays(bad: float) -> None:
    assert decide([math.nan, 0.1], 1.01).leave_B.tolist() == [False, True]
    assert decide([math.nan, 0.25], 1.01).confidence_B.tolist() == [0.0, 0.75]
    logits_BC = torch.tensor([[0.0, bad], [0.0, 1.0]])
    assert decide([0.0, 0.0], 0.5, logits_BC).leave_B.tolist() == [False, True]


def test_a_judge_that_is_surest_of_being_right_does_not_leave_at_theta_zero() -> None:
    assert decide([0.0], theta=0.0).leave_B.tolist() == [False], "a sigmoid does reach 0"


@torch.no_grad()
def test_a_judge_worked_out_by_hand() -> None:
    spec = HeadSpec(TaskSpec("classification", ("a", "b")), 2, 1, (1,), METHODS["berxit"].settings)
    branch = METHODS["berxit"].branches(spec)["1"].eval()
    values = {"pooler": ([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]),
              "classifier": ([[4.0, 0.0], [0.0, 4.0]], [0.0, 1.0]),
              "judge": ([[2.0, -1.0]], [-1.5 - math.log(3.0)])}  # fmt: skip
    for name, (weight, bias) in values.items():
        branch.get_parameter(f"{name}.weight").copy_(torch.tensor(weight))
        branch.get_parameter(f"{name}.bias").copy_(torch.tensor(bias))
    # Pooled (0.5, -0.5). The judge: 2 * 0.5 + 0.5 - 1.5 - ln 3, whose sigmoid is 1 / (1 + 3).
    hidden_BTD = torch.tensor([[[0.5, -0.5], [9.0, 9.0]]]).atanh()
    outputs = branch(hidden_BTD, torch.ones(1, 2, dtype=torch.bool), {})
    torch.testing.assert_close(outputs["logits"], torch.tensor([[2.0, -1.0]]))
    torch.testing.assert_close(outputs["wrong"], torch.tensor([0.25]))
    for theta, leaves in ((0.24, False), (0.26, True)):
        decision = LearnedPolicy().decide(outputs, {}, {"theta": torch.tensor(theta)}, 1)
        assert decision.leave_B.item() is leaves
        assert decision.confidence_B.item() == pytest.approx(0.75)


# The architecture


def test_one_judge_of_width_plus_one_numbers_serves_all_exits() -> None:
    model, plain = toy_model("berxit", n_layers=N), toy_model("deebert", n_layers=N)
    judges = {model.exits[str(d)].get_parameter("judge.weight") for d in range(1, N + 1)}
    assert [tuple(judge.shape) for judge in judges] == [(1, model.spec.width)]
    n, n_plain = (sum(p.numel() for p in m.exits.parameters()) for m in (model, plain))
    assert n - n_plain == model.spec.width + 1


def test_the_judge_reads_the_vector_that_the_classifier_reads_before_dropout() -> None:
    spec = HeadSpec(CLASSES, 16, 1, (1,), METHODS["berxit"].settings, dropout=0.5)
    torch.manual_seed(0)
    branch = METHODS["berxit"].branches(spec)["1"].train()
    hidden_BTD, mask_BT = torch.randn(4, 3, 16), torch.ones(4, 3, dtype=torch.bool)
    first, second = (branch(hidden_BTD, mask_BT, {}) for _ in range(2))
    assert torch.equal(first["wrong"], second["wrong"])
    assert not torch.equal(first["logits"], second["logits"])
    pooled_BD = torch.tanh(branch.get_submodule("pooler")(hidden_BTD[:, 0]))
    by_hand_B = torch.sigmoid(branch.get_submodule("judge")(pooled_BD))[:, 0]
    assert torch.equal(first["wrong"], by_hand_B)


def test_with_the_entropy_rule_it_decides_as_deebert(batch: Activations[NumpyArray]) -> None:
    model, plain = (
        toy_model(name, n_layers=N, seed=5, settings=settings)
        for name, settings in (("berxit", {"rule": "entropy"}), ("deebert", {}))
    )
    knobs = mixed_knobs(plain)
    assert model.knobs == plain.knobs
    assert outcome(model, batch, knobs["threshold"][0]).same_as(
        whole(TorchLayers(plain), batch, knobs)
    )
    assert METHODS["berxit"].learned({"rule": "entropy"}) == ("logits",)
    assert METHODS["berxit"].learned({"rule": "lte"}) == ("logits", "wrong")


def test_a_rule_that_cannot_be_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="a number has no entropy"):
        toy_model("berxit", task=VALUES, settings={"rule": "entropy"})
    with pytest.raises(ValueError, match="rule 'certainty': must be lte or entropy"):
        toy_model("berxit", settings={"rule": "certainty"})


@pytest.mark.slow
def test_the_graphs_of_the_entropy_rule_decide_as_torch_does(tmp_path: Path) -> None:
    model = toy_model("berxit", seed=7, settings={"rule": "entropy"})
    bundle = save_model(tmp_path, model, toy_tokenizer(), About("toy", 64, 1))
    graphs, knobs = OnnxLayers(add_graphs(bundle, precisions=["fp32"])), mixed_knobs(model)
    got = Outcome.of(run(graphs, inputs(32), model.n_layers, knobs).left)
    close(got, whole(TorchLayers(model), inputs(32), knobs))
