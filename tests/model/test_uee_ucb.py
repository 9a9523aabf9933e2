"""UEE-UCB's part of the model against its sheet; the bandit is in tests/edge/test_bandit.py, and both over
the wire in tests/edge/test_chooser.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import subjects
import torch
from law import Outcome, whole
from toy_models import toy_model

from offramp_common.activations import Activations, NumpyArray
from offramp_common.runner import Knobs, run
from offramp_common.spec import StateField, never_exit
from offramp_model.exits import Decision
from offramp_model.methods import METHODS
from offramp_model.methods.uee_ucb import ChosenExitPolicy
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch

N = 7
EXITS = (1, 3, 5, 7)


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    """Exits after some layers only, as the paper's."""
    return toy_model("uee_ucb", n_layers=N, exits=EXITS, seed=3)


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(32, below=30)


def at(stop: float) -> Knobs:
    return {"stop": (stop,) * N}


def play(logits: list[list[list[float]]], stop: float = 3.0) -> list[Decision]:
    """The decisions at exits 1, 2, ... for rows with these logits, [exit][row][class]."""
    policy, knobs = ChosenExitPolicy(), {"stop": torch.tensor(stop)}
    state = policy.start(torch.ones(len(logits[0]), 1, dtype=torch.bool))
    decisions = []
    for depth, logits_BC in enumerate(logits, start=1):
        outputs = {"logits": torch.tensor(logits_BC)}
        decisions.append(policy.decide(outputs, state, knobs, depth))
        state = decisions[-1].state
    return decisions


@pytest.mark.parametrize(
    ("stop", "depth"), [(1, 1), (2, 3), (3, 3), (4, 5), (5, 5), (6, 7), (7, 7)]
)
def test_every_row_leaves_at_the_first_exit_that_is_deep_enough(
    model: MultiExitModel, inputs: Activations[NumpyArray], stop: int, depth: int
) -> None:
    got = whole(TorchLayers(model), inputs, at(stop))
    assert set(got.depth_B.tolist()) == {depth}


def test_the_answer_is_the_chosen_exits_whatever_the_others_say(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    """Each exit's answer does not depend on which exit was chosen."""
    told: dict[int, np.ndarray] = {}
    layers, acts = TorchLayers(model), to_torch(inputs)
    run(layers, acts, N, never_exit(model.knobs, N), lambda d, rows, look: told.update(
        {d: look.answer.numpy()}
    ))  # fmt: skip
    for depth in EXITS:
        np.testing.assert_array_equal(whole(layers, inputs, at(depth)).answers, told[depth])


def test_only_the_first_exits_class_is_carried() -> None:
    assert ChosenExitPolicy().state_fields(5) == {"first": StateField("int16")}
    rows = play([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]])
    for decision in rows:
        assert decision.state["first"].dtype == torch.int16
        assert decision.state["first"].tolist() == [2, 0]


def test_the_first_exits_class_reaches_the_cloud(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    layers = TorchLayers(model)
    first = whole(layers, inputs, at(1)).answers.argmax(axis=1)
    for depth in range(1, N):
        rest = run(layers, to_torch(inputs), depth, at(N)).rest
        assert rest is not None
        assert model.cut(depth).state == {"first": StateField("int16")}
        assert rest.state["first"].tolist() == first.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_number_has_no_class_and_does_not_leave(bad: float) -> None:
    (first, second) = play([[[bad, 1.0], [0.0, 1.0]], [[5.0, 1.0], [bad, 1.0]]], stop=1.0)
    assert first.leave_B.tolist() == [False, True]
    assert first.state["first"].tolist() == [-1, 1]
    assert first.confidence_B[0] == 0
    assert second.leave_B.tolist() == [True, False]
    assert second.state["first"].tolist() == [-1, 1], "the first exit's, and no later one's"


def test_a_choice_for_each_depth_lets_rows_leave_where_it_is_met() -> None:
    policy = ChosenExitPolicy()
    outputs, state = {"logits": torch.zeros(1, 2)}, policy.start(torch.ones(1, 1, dtype=torch.bool))
    leaves = [
        policy.decide(outputs, state, {"stop": torch.tensor(stop)}, 2).leave_B.item()
        for stop in (1.0, 2.0, 3.0, math.nan)
    ]
    assert leaves == [True, True, False, False]


def test_confidence_is_the_largest_probability() -> None:
    (decision,) = play([[[math.log(3.0), 0.0], [0.0, 0.0]]])
    # Float32 of 3 / (3 + 1).
    np.testing.assert_allclose(decision.confidence_B.numpy(), [0.75, 0.5], rtol=1e-6)


def test_each_exit_has_a_pooler_and_a_classifier_of_its_own(model: MultiExitModel) -> None:
    for name in ("pooler.weight", "classifier.weight"):
        exits = [model.exits[str(depth)].get_parameter(name).data_ptr() for depth in EXITS]
        assert len(set(exits)) == len(EXITS)


def test_it_is_the_method_whose_exit_is_chosen_beforehand() -> None:
    assert [method.name for method in METHODS.values() if method.online] == ["uee_ucb"]


def test_a_cut_changes_nothing(model: MultiExitModel, inputs: Activations[NumpyArray]) -> None:
    """Where the cut lies at the chosen exit nothing crosses; behind it, nothing is left to run."""
    layers, expected = TorchLayers(model), whole(TorchLayers(model), inputs, at(5))
    for depth in range(N + 1):
        first = run(layers, to_torch(inputs), depth, at(5))
        assert (first.rest is None) == (depth >= 5)
        left = first.left if first.rest is None else run(layers, first.rest, N, at(5)).left
        assert Outcome.of(left).same_as(expected)
