"""PABEE against its paper and sheet, and on sequences worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import subjects
import torch
from law import Outcome, whole
from toy_models import toy_model

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import Knobs, run
from offramp_common.spec import StateField, TaskSpec
from offramp_model.methods.pabee import PatiencePolicy
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch

N = 8
REGRESSION = TaskSpec("regression")


# LeeBERT and GAML-BERT decide by this rule, and are held to it here.
RULED = [("pabee", "classification"), ("pabee", "regression"), ("leebert", "classification"),
         ("leebert", "regression"), ("gaml_bert", "classification")]  # fmt: skip


@pytest.fixture(scope="module", params=RULED, ids="-".join)
def model(request: pytest.FixtureRequest) -> MultiExitModel:
    method, kind = request.param
    task = TaskSpec("classification", ("a", "b", "c")) if kind != "regression" else REGRESSION
    return toy_model(method, n_layers=N, task=task, seed=1)


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(64, below=30)


def at(model: MultiExitModel, patience: float, tolerance: float = 0.5) -> Knobs:
    knobs = {"patience": (patience,) * N}
    return knobs if len(model.knobs) == 1 else {**knobs, "tolerance": (tolerance,) * N}


def outcome(model: MultiExitModel, inputs: Activations[NumpyArray], knobs: Knobs) -> Outcome:
    return whole(TorchLayers(model), inputs, knobs)


def play(predictions: Sequence[float], patience: int, tolerance: float | None = None) -> int | None:
    """The exit (from 1) at which one sample with these predictions leaves; None: at none of them.

    Predictions are classes (0 to 9), or with a tolerance the values of a regression.
    """
    policy = PatiencePolicy(len(predictions), regression=tolerance is not None)
    knobs = {"patience": torch.tensor(float(patience)), "tolerance": torch.tensor(tolerance or 0.0)}
    state = policy.start(torch.ones(1, 1, dtype=torch.bool))
    for depth, prediction in enumerate(predictions, start=1):
        if tolerance is None:
            logits_BC = torch.nn.functional.one_hot(torch.tensor([int(prediction)]), 10).float()
        else:
            logits_BC = torch.tensor([[prediction]])
        decision = policy.decide({"logits": logits_BC}, state, knobs, depth)
        if decision.leave_B.item():
            return depth
        state = decision.state
    return None


# The sheet's "How to test". The first half of its sixth line (cut anywhere, the state sent) is in
# test_law.py and test_methods_contract.py.


def test_with_patience_of_all_layers_every_sample_gets_the_last_heads_answer(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    got = outcome(model, inputs, at(model, N, tolerance=1e9))
    assert (got.depth_B == N).all()
    last_only = toy_model("pabee", n_layers=N, exits=[N], task=model.spec.task, seed=1)
    last_only.backbone = model.backbone
    last_only.exits[str(N)].load_state_dict(model.exits[str(N)].state_dict())
    expected = outcome(last_only, inputs, at(model, N))
    np.testing.assert_array_equal(got.answers, expected.answers)


def test_patience_one_leaves_at_the_first_class_that_repeats() -> None:
    assert play([3, 3, 1, 1, 1], patience=1) == 2
    assert play([3, 2, 1, 1, 1], patience=1) == 4
    assert play([3, 2, 3, 2, 2], patience=1) == 5


def test_no_sample_leaves_earlier_with_more_patience(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    depths = [outcome(model, inputs, at(model, patience)).depth_B for patience in range(1, N + 1)]
    for less, more in itertools.pairwise(depths):
        assert (more >= less).all()
    assert len({float(depth_B.mean()) for depth_B in depths}) > 3, "patience must make a difference"


@pytest.mark.parametrize("patience", range(1, 6))
def test_constant_predictions_leave_at_exit_t_plus_one(patience: int) -> None:
    assert play([4] * 6, patience) == patience + 1
    assert play([0.25] * 6, patience, tolerance=0.1) == patience + 1


def test_alternating_predictions_never_leave() -> None:
    assert play([1, 2] * 6, patience=1) is None
    assert play([0.0, 1.0] * 6, patience=1, tolerance=0.5) is None


@pytest.mark.parametrize("k", range(1, N))
def test_a_cloud_that_loses_the_state_lets_no_sample_leave_earlier(
    model: MultiExitModel, inputs: Activations[NumpyArray], k: int
) -> None:
    """With the state they leave as if never cut: test_law. Without it, not before exit k + t + 1."""
    patience, layers = 2, TorchLayers(model)
    knobs = at(model, patience)
    expected = outcome(model, inputs, knobs)
    first = run(layers, to_torch(inputs), k, knobs)
    assert first.rest is not None, "some rows must be left to test anything"
    start = model.policy.start(torch.from_numpy(mask_of(first.rest.lengths_B)))
    dropped = Outcome.of(run(layers, replace(first.rest, state=start), N, knobs).left)
    assert (dropped.depth_B >= expected.depth_B[first.rest_rows]).all()
    assert (dropped.depth_B >= min(k + patience + 1, N)).all()


def test_regression_with_tolerance_zero_never_leaves_early(inputs: Activations[NumpyArray]) -> None:
    assert play([0.5] * 6, patience=1, tolerance=0.0) is None, "the comparison is strict"
    model = toy_model("pabee", n_layers=N, task=REGRESSION, seed=1)
    assert (outcome(model, inputs, at(model, 1, tolerance=0.0)).depth_B == N).all()


# Its pitfalls, and sequences worked out by hand


def test_agreements_are_counted_and_not_equal_predictions() -> None:
    assert play([7, 7, 7, 7], patience=3) == 4
    assert play([7, 7, 7], patience=3) is None


def test_a_disagreement_sets_the_count_to_zero_and_not_to_one() -> None:
    # Agreements: -, 1, 0, 1, 2. A count that restarted at 1 would leave at exit 4.
    assert play([5, 5, 6, 6, 6], patience=2) == 5


def test_a_value_is_compared_with_the_exit_just_before_and_not_with_the_first() -> None:
    # Drifts by 0.08 an exit: neighbours agree within 0.1, the first and the third do not.
    drifting = [0.0, 0.08, 0.16, 0.24, 0.32]
    assert play(drifting, patience=3, tolerance=0.1) == 4
    # Away and back to the first value: only a comparison with the first would count it.
    assert play([0.0, 1.0, 0.0, 1.0, 0.0], patience=1, tolerance=0.1) is None


def test_values_exactly_tolerance_apart_do_not_agree() -> None:
    assert play([0.0, 0.5, 1.0], patience=1, tolerance=0.5) is None
    assert play([0.0, 0.5, 1.0], patience=1, tolerance=0.5001) == 2


def test_class_zero_does_not_agree_with_having_no_prediction_yet() -> None:
    assert play([0, 0], patience=1) == 2
    assert play([0.0, 0.0], patience=1, tolerance=0.1) == 2


def test_each_row_keeps_its_own_count() -> None:
    policy = PatiencePolicy(4, regression=False)
    knobs = {"patience": torch.tensor(2.0)}
    # Rows: always class 0; 1 then 0 from the second exit on; another class each time.
    classes = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 2], [0, 0, 0]])
    state, left = policy.start(torch.ones(3, 1, dtype=torch.bool)), []
    for depth, classes_B in enumerate(classes, start=1):
        logits_BC = torch.nn.functional.one_hot(classes_B, 3).float()
        decision = policy.decide({"logits": logits_BC}, state, knobs, depth)
        state = decision.state
        left.append(decision.leave_B.tolist())
    assert left == [
        [False, False, False],
        [False, False, False],
        [True, False, False],
        [True, True, False],
    ]
    assert state["count"].tolist() == [3, 2, 0]
    assert state["previous"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_agrees_with_nothing(bad: float) -> None:
    assert play([bad] * 5, patience=1, tolerance=1e9) is None
    assert play([0.1, bad, 0.1, 0.1], patience=1, tolerance=0.5) == 4


def test_a_nan_logit_agrees_with_nothing() -> None:
    policy = PatiencePolicy(3, regression=False)
    knobs = {"patience": torch.tensor(1.0)}
    broken = {"logits": torch.tensor([[math.nan, 1.0], [0.0, 1.0]])}
    state = policy.start(torch.ones(2, 1, dtype=torch.bool))
    for depth in (1, 2, 3):
        decision = policy.decide(broken, state, knobs, depth)
        state = decision.state
        assert not decision.leave_B[0].item()
    assert decision.leave_B[1].item(), "the other row leaves all the same"
    assert state["previous"].tolist() == [-1, 1]


def test_the_count_does_not_wrap_around_in_its_byte() -> None:
    assert play([1] * 300, patience=299) is None, "a count that wrapped would be 44 there"
    assert play([1] * 300, patience=250) == 251


# What is carried, and the architecture


def test_the_state_is_a_byte_and_a_class_or_a_value() -> None:
    count = StateField("uint8")
    assert PatiencePolicy(6, regression=False).state_fields(3) == {
        "count": count,
        "previous": StateField("int16"),
    }
    assert PatiencePolicy(6, regression=True).state_fields(3) == {
        "count": count,
        "previous": StateField("float32"),
    }


def test_all_exits_share_one_pooler_and_none_a_classifier(model: MultiExitModel) -> None:
    exits = [model.exits[str(depth)] for depth in range(1, N + 1)]
    assert len({exit_.get_parameter("pooler.weight").data_ptr() for exit_ in exits}) == 1
    assert len({exit_.get_parameter("classifier.weight").data_ptr() for exit_ in exits}) == N


def test_confidence_is_the_count_as_a_share_of_all_layers() -> None:
    policy = PatiencePolicy(4, regression=True)
    state = {"count": torch.tensor([0, 2, 200], dtype=torch.uint8), "previous": torch.zeros(3)}
    knobs = {"patience": torch.tensor(4.0), "tolerance": torch.tensor(0.1)}
    decision = policy.decide({"logits": torch.tensor([[5.0], [0.0], [0.0]])}, state, knobs, 3)
    assert decision.confidence_B.tolist() == [0.0, 0.75, 1.0]


def test_exits_may_stand_after_some_layers_only(inputs: Activations[NumpyArray]) -> None:
    """The count is of exits: with three of them, patience 2 leaves at the last at the earliest."""
    model = toy_model("pabee", n_layers=N, exits=[2, 5, 7, N], seed=1)
    got = outcome(model, inputs, at(model, 1))
    assert set(got.depth_B.tolist()) <= {5, 7, N}
    assert (got.depth_B == 5).any()
    assert set(outcome(model, inputs, at(model, 2)).depth_B.tolist()) <= {7, N}
