"""PCEE-BERT against its paper and sheet, and on sequences worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import subjects
import torch
from law import Outcome, cut_at, whole
from toy_models import LABELS, mixed_knobs, toy_bundle, toy_inputs, toy_layers, toy_model

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import Knobs, run
from offramp_common.spec import StateField, TaskSpec
from offramp_edge.runtime import OnnxLayers
from offramp_model.exits import Decision, State
from offramp_model.export import add_graphs
from offramp_model.methods.pabee import PatiencePolicy
from offramp_model.methods.pcee_bert import ConfidentRunPolicy
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch

N = 8
LN_C = math.log(len(LABELS))
REGRESSION = TaskSpec("regression")


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return toy_model("pcee_bert", n_layers=N, seed=1)


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(64, below=30)


def at(patience: float, threshold: float) -> Knobs:
    return {"patience": (patience,) * N, "threshold": (threshold,) * N}


def outcome(
    model: MultiExitModel, inputs: Activations[NumpyArray], patience: float, threshold: float
) -> Outcome:
    return whole(TorchLayers(model), inputs, at(patience, threshold))


def decisions(
    probabilities: Sequence[Sequence[float]],
    patience: int,
    threshold: float = 0.5,
    answer: str = "last",
) -> list[Decision]:
    """Of one sample with these probabilities at the exits. Entropies as shares of ln 2: of (0.9, 0.1) 0.469,
    of (0.8, 0.2) 0.722, of (0.5, 0.5) 1."""
    exits = tuple(range(1, len(probabilities) + 1))
    policy = ConfidentRunPolicy(exits, len(probabilities[0]), answer)
    knobs = {"patience": torch.tensor(float(patience)), "threshold": torch.tensor(threshold)}
    state: State = policy.start(torch.ones(1, 1, dtype=torch.bool))
    made = []
    for depth, p in zip(exits, probabilities, strict=True):
        logits_BC = torch.tensor([p]).log()
        made.append(policy.decide({"logits": logits_BC}, state, knobs, depth))
        state = made[-1].state
    return made


SURE, ALSO, UNSURE = (0.9, 0.1), (0.05, 0.95), (0.5, 0.5)


def leaves_at(
    probabilities: Sequence[Sequence[float]], patience: int, threshold: float = 0.5
) -> int | None:
    """The exit, from 1."""
    left = [d.leave_B.item() for d in decisions(probabilities, patience, threshold)]
    return left.index(True) + 1 if True in left else None


# The sheet's "How to test"


def test_with_patience_one_it_is_leaving_by_entropy(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    """DeeBERT on the same heads; its threshold is in nats."""
    deebert = toy_model("deebert", n_layers=N, seed=1)
    deebert.backbone = model.backbone
    for depth, head in model.exits.items():
        deebert.exits[depth].load_state_dict(head.state_dict())
    for share in (0.2, 0.5, 0.8):
        expected = whole(TorchLayers(deebert), inputs, {"threshold": (share * LN_C,) * N})
        got = outcome(model, inputs, 1, share)
        assert len(set(got.depth_B.tolist())) > 1
        assert got.same_as(expected)


def test_at_threshold_zero_nobody_leaves_and_above_one_all_leave_at_exit_t(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    for patience in (1, 3):
        assert (outcome(model, inputs, patience, 0.0).depth_B == N).all()
    for patience in range(1, N + 1):
        assert (outcome(model, inputs, patience, 1.01).depth_B == patience).all()


def test_samples_leave_earlier_at_a_higher_threshold_and_later_with_more_patience(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    lower_to_higher = [outcome(model, inputs, 2, step / 20).depth_B for step in range(21)]
    more_to_less = [outcome(model, inputs, t, 0.7).depth_B for t in range(N, 0, -1)]
    for depths in (lower_to_higher, more_to_less):
        for later, earlier in itertools.pairwise(depths):
            assert (earlier <= later).all()
        assert len({float(depth_B.mean()) for depth_B in depths}) > 3, "it must make a difference"


def test_an_exit_that_is_not_confident_sets_the_count_to_zero() -> None:
    assert leaves_at([SURE, UNSURE, SURE, SURE], patience=2) == 4
    counts = [d.state["count"].item() for d in decisions([SURE, UNSURE, SURE, SURE], 2)]
    assert counts == [1, 0, 1, 2]


def test_a_cloud_that_loses_the_count_leaves_later_on_a_crafted_case() -> None:
    """With the count sent along they leave as if never cut: the contract's tests."""
    carried = decisions([SURE, SURE], patience=2)
    assert carried[1].leave_B.item()
    policy = ConfidentRunPolicy((1, 2), 2)
    knobs = {"patience": torch.tensor(2.0), "threshold": torch.tensor(0.5)}
    fresh = policy.start(torch.ones(1, 1, dtype=torch.bool))
    lost = policy.decide({"logits": torch.tensor([SURE]).log()}, fresh, knobs, 2)
    assert not lost.leave_B.item()


def test_a_cloud_that_loses_the_count_lets_no_sample_leave_earlier(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    layers, knobs, k = TorchLayers(model), at(3, 0.8), 2
    expected = whole(layers, inputs, knobs)
    first = run(layers, to_torch(inputs), k, knobs)
    assert first.rest is not None
    start = model.policy.start(torch.from_numpy(mask_of(first.rest.lengths_B)))
    lost = Outcome.of(run(layers, replace(first.rest, state=start), N, knobs).left)
    assert (lost.depth_B >= expected.depth_B[first.rest_rows]).all()
    assert (lost.depth_B > expected.depth_B[first.rest_rows]).any()


# Its pitfalls, and sequences worked out by hand


def test_another_class_does_not_end_a_confident_run() -> None:
    assert leaves_at([SURE, ALSO, SURE], patience=3) == 3


def test_the_earliest_exit_is_t_and_not_one_later() -> None:
    for patience in range(1, 5):
        assert leaves_at([SURE] * 5, patience) == patience


def test_entropy_is_a_share_of_ln_c_and_must_be_below_the_threshold() -> None:
    exactly = 1.0 - decisions([(0.8, 0.2)], 1)[0].confidence_B.item()
    assert exactly == pytest.approx(0.7219281, abs=1e-6)  # 0.5004024 nats over 0.6931472
    assert leaves_at([(0.8, 0.2)], 1, threshold=exactly - 1e-6) is None
    assert leaves_at([(0.8, 0.2)], 1, threshold=exactly + 1e-6) == 1
    even = (0.25, 0.25, 0.25, 0.25)
    assert leaves_at([even], 1, threshold=1.0) is None, "the comparison is strict"
    assert leaves_at([even], 1, threshold=1.01) == 1


def test_each_row_keeps_its_own_count() -> None:
    policy = ConfidentRunPolicy((1, 2, 3), 2)
    knobs = {"patience": torch.tensor(2.0), "threshold": torch.tensor(0.5)}
    rows = torch.tensor(
        [[SURE, UNSURE, SURE], [SURE, SURE, UNSURE], [SURE, ALSO, UNSURE]]  # exit by exit
    )
    state, left = policy.start(torch.ones(3, 1, dtype=torch.bool)), []
    for depth, p_BC in enumerate(rows, start=1):
        decision = policy.decide({"logits": p_BC.log()}, state, knobs, depth)
        state = decision.state
        left.append(decision.leave_B.tolist())
    assert left == [[False, False, False], [True, False, False], [True, True, False]]
    assert state["count"].tolist() == [3, 2, 0]


def test_the_count_does_not_wrap_around_in_its_byte() -> None:
    assert leaves_at([SURE] * 300, patience=299) is None, "a count that wrapped would be 44 there"
    assert leaves_at([SURE] * 300, patience=250) == 250


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("answer", ["last", "run", "all"])
def test_a_row_that_is_no_number_is_never_confident(bad: float, answer: str) -> None:
    policy = ConfidentRunPolicy((1, 2, 3), 2, answer)
    knobs = {"patience": torch.tensor(1.0), "threshold": torch.tensor(1.01)}
    state: State = policy.start(torch.ones(2, 1, dtype=torch.bool))
    for depth in (1, 2, 3):
        logits_BC = torch.tensor([[bad, 1.0], [0.0, 1.0]])
        decision = policy.decide({"logits": logits_BC}, state, knobs, depth)
        state = decision.state
        assert decision.leave_B.tolist() == [False, True]
        assert decision.confidence_B[0].item() == 0.0


# What it answers


def answers(
    probabilities: Sequence[Sequence[float]], answer: str, patience: int = 9
) -> list[list[float]]:
    """softmax of the answer at each exit."""
    made = decisions(probabilities, patience, answer=answer)
    return [d.answer.softmax(dim=-1)[0].tolist() for d in made]


def test_the_answer_is_the_last_exits_own_unless_told_otherwise() -> None:
    made = decisions([SURE, ALSO], patience=2)
    assert torch.equal(made[1].answer, torch.tensor([ALSO]).log())


def test_the_mean_of_the_run_is_of_confident_exits_alone() -> None:
    sequence = [SURE, UNSURE, ALSO, SURE]
    expected = [
        [0.9, 0.1],
        [0.5, 0.5],  # no run: the exit's own
        [0.05, 0.95],  # the run begins anew, without the unsure exit before it
        [(0.05 + 0.9) / 2, (0.95 + 0.1) / 2],
    ]
    np.testing.assert_allclose(answers(sequence, "run"), expected, atol=1e-6)


def test_the_mean_of_all_is_of_every_exit_so_far() -> None:
    expected = [[0.9, 0.1], [0.7, 0.3], [(1.4 + 0.05) / 3, (0.6 + 0.95) / 3]]
    np.testing.assert_allclose(answers([SURE, UNSURE, ALSO], "all"), expected, atol=1e-6)


def test_the_mean_of_all_counts_exits_and_not_layers() -> None:
    policy = ConfidentRunPolicy((2, 5), 2, "all")
    knobs = {"patience": torch.tensor(9.0), "threshold": torch.tensor(0.5)}
    state: State = policy.start(torch.ones(1, 1, dtype=torch.bool))
    state = policy.decide({"logits": torch.tensor([SURE]).log()}, state, knobs, 2).state
    last = policy.decide({"logits": torch.tensor([UNSURE]).log()}, state, knobs, 5)
    np.testing.assert_allclose(last.answer.softmax(dim=-1), [[0.7, 0.3]], atol=1e-6)


def test_a_class_of_no_probability_gets_a_number_all_the_same() -> None:
    for answer in ("run", "all"):
        (decision,) = decisions([(1.0, 0.0)], 1, answer=answer)
        assert torch.isfinite(decision.answer).all()
        np.testing.assert_allclose(decision.answer.softmax(dim=-1), [[1.0, 0.0]], atol=1e-12)


def test_a_means_answer_does_not_change_who_leaves_where(inputs: Activations[NumpyArray]) -> None:
    depths = [
        outcome(toy_model("pcee_bert", n_layers=N, seed=1, settings={"answer": a}), inputs, 2, 0.7)
        for a in ("last", "run", "all")
    ]
    for other in depths[1:]:
        np.testing.assert_array_equal(other.depth_B, depths[0].depth_B)
        assert np.abs(other.answers - depths[0].answers).max() > 0.1


def test_what_is_carried_is_a_count_and_for_means_a_sum() -> None:
    count = StateField("uint8")
    assert ConfidentRunPolicy((1, 2), 7).state_fields(1) == {"count": count}
    for answer in ("run", "all"):
        fields = ConfidentRunPolicy((1, 2), 7, answer).state_fields(1)
        assert fields == {"count": count, "sum": StateField("float32", (7,))}


@pytest.mark.parametrize("answer", ["run", "all"])
def test_with_means_a_model_cut_anywhere_gives_the_same_answers(
    answer: str, inputs: Activations[NumpyArray]
) -> None:
    model = toy_model("pcee_bert", n_layers=4, seed=1, settings={"answer": answer})
    layers, knobs = TorchLayers(model), mixed_knobs(model)
    cuts = {depth: model.cut(depth) for depth in range(4)}
    expected = whole(layers, inputs, knobs)
    assert len(set(expected.depth_B.tolist())) > 1
    for k in range(5):
        assert cut_at(k, layers, inputs, knobs, cuts).same_as(expected), f"split point {k}"


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["run", "all"])
def test_with_means_the_graphs_decide_as_torch_does(tmp_path: Path, answer: str) -> None:
    toy = toy_bundle(tmp_path, "pcee_bert", n_layers=3, seed=7, settings={"answer": answer})
    bundle = add_graphs(toy, ["fp32"])
    inputs = toy_inputs(bundle, [5, 12, 1, 9, 30, 7] * 4)
    expected = whole(toy_layers(bundle), inputs, bundle.knobs("fp32"))
    got = Outcome.of(run(OnnxLayers(bundle), inputs, 3, bundle.knobs("fp32")).left)
    np.testing.assert_array_equal(got.depth_B, expected.depth_B)
    # Sums in another order; logarithms of probabilities down to 1e-6 or so.
    np.testing.assert_allclose(got.answers, expected.answers, rtol=0, atol=1e-3)


# The rest


def test_a_regression_goes_by_pabees_rule() -> None:
    model = toy_model("pcee_bert", n_layers=N, task=REGRESSION)
    assert model.policy == PatiencePolicy(N, regression=True)
    assert [knob.name for knob in model.knobs] == ["patience", "tolerance"]


def test_answers_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="answer 'best': must be last, run or all"):
        toy_model("pcee_bert", settings={"answer": "best"})
    with pytest.raises(ValueError, match="means are of probabilities"):
        toy_model("pcee_bert", task=REGRESSION, settings={"answer": "run"})


def test_all_exits_share_one_pooler_and_none_a_classifier(model: MultiExitModel) -> None:
    exits = [model.exits[str(depth)] for depth in range(1, N + 1)]
    assert len({exit_.get_parameter("pooler.weight").data_ptr() for exit_ in exits}) == 1
    assert len({exit_.get_parameter("classifier.weight").data_ptr() for exit_ in exits}) == N
