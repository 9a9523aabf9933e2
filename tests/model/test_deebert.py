"""DeeBERT against its paper and sheet, and on numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import subjects
import torch
from law import Outcome, whole
from toy_models import LABELS, toy_model

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import Knobs
from offramp_common.spec import TaskSpec, never_exit
from offramp_model.exits import Decision, PooledClassifier
from offramp_model.methods.deebert import EntropyPolicy, entropy
from offramp_model.split_model import MultiExitModel, TorchLayers

N = 5
LN_C = math.log(len(LABELS))


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return toy_model("deebert", n_layers=N, seed=3)


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(48, below=30)


def at(threshold: float) -> Knobs:
    return {"threshold": (threshold,) * N}


def outcome(model: MultiExitModel, inputs: Activations[NumpyArray], threshold: float) -> Outcome:
    return whole(TorchLayers(model), inputs, at(threshold))


def decide(logits: list[list[float]], threshold: float) -> Decision:
    policy = EntropyPolicy(len(logits[0]))
    return policy.decide(
        {"logits": torch.tensor(logits)}, {}, {"threshold": torch.tensor(threshold)}, 1
    )


# The sheet's "How to test". Its fourth line (stage 2 changes nothing of stage 1) is in
# tests/train/test_loop.py, its fifth (cut anywhere) in test_law.py and test_methods_contract.py.


@torch.inference_mode()
def test_at_threshold_zero_every_sample_gets_the_plain_models_answer_bit_for_bit(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    got = outcome(model, inputs, 0.0)
    mask_BT = torch.from_numpy(mask_of(inputs.lengths_B))
    hidden_BTD = model.backbone.embed(torch.from_numpy(inputs.hidden_BTD))
    hidden_BTD = model.backbone.run_layers(hidden_BTD, mask_BT, 0, N)
    final = model.exits[str(N)]
    assert isinstance(final, PooledClassifier)
    plain_BC = final.classifier(torch.tanh(final.pooler(hidden_BTD[:, 0])))
    assert (got.depth_B == N).all()
    np.testing.assert_array_equal(got.answers, plain_BC.numpy())


def test_above_ln_c_every_sample_leaves_at_layer_one_with_its_heads_answer(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    got = outcome(model, inputs, LN_C * 1.001)
    assert (got.depth_B == 1).all()
    only_first = toy_model("deebert", n_layers=1, seed=0)
    only_first.backbone.layers[0] = model.backbone.layers[0]
    only_first.backbone.embeddings = model.backbone.embeddings
    only_first.exits["1"].load_state_dict(model.exits["1"].state_dict())
    expected = whole(TorchLayers(only_first), inputs, {"threshold": (0.0,)})
    np.testing.assert_array_equal(got.answers, expected.answers)


def test_no_sample_leaves_later_at_a_higher_threshold(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    depths = [outcome(model, inputs, LN_C * step / 20).depth_B for step in range(22)]
    for lower, higher in itertools.pairwise(depths):
        assert (higher <= lower).all()
    means = {float(depth_B.mean()) for depth_B in depths}
    assert len(means) > 5, "the thresholds must make a difference"


# Worked out by hand


def test_entropy_is_in_nats_and_not_divided_by_ln_c() -> None:
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)
    # -0.9 ln 0.9 - 0.1 ln 0.1 = 0.0948245 + 0.2302585
    expected = torch.tensor([0.3250830, 0.6931472, 0.5004024], dtype=torch.float64)
    torch.testing.assert_close(entropy(p.log()), expected, rtol=0, atol=1e-7)
    quarters = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()  # with a class of probability 0
    assert entropy(quarters).item() == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_uniform_logits_have_the_largest_entropy_whatever_their_size() -> None:
    for value in (0.0, 1e4, -1e30):
        assert entropy(torch.full((1, 7), value)).item() == pytest.approx(math.log(7), abs=1e-6)


def test_a_sample_leaves_below_the_threshold_and_not_at_it() -> None:
    logits = [[1.0, 0.0]]
    exactly = entropy(torch.tensor(logits)).item()
    assert not decide(logits, exactly).leave_B.item()
    assert decide(logits, math.nextafter(exactly, 1) + 1e-6).leave_B.item()


def test_rows_leave_one_by_one() -> None:
    # Entropies: ln 2 = 0.693, 0.582, 0.040.
    rows = [[0.0, 0.0], [1.0, 0.0], [5.0, 0.0]]
    assert decide(rows, 0.05).leave_B.tolist() == [False, False, True]
    assert decide(rows, 0.60).leave_B.tolist() == [False, True, True]
    assert decide(rows, 0.70).leave_B.tolist() == [True, True, True]


def test_the_answer_is_the_heads_logits_and_nothing_is_carried() -> None:
    decision = decide([[1.0, 3.0], [2.0, -1.0]], 0.1)
    assert decision.answer.tolist() == [[1.0, 3.0], [2.0, -1.0]]
    assert decision.state == {}
    assert EntropyPolicy(2).state_fields(3) == {}


def test_confidence_is_one_less_the_entropy_as_a_share_of_ln_c() -> None:
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0]])
    confidence_B = decide(p.log().tolist(), 0.0).confidence_B
    expected = torch.tensor([1 - 0.3250830 / 0.6931472, 0.0, 1.0])
    torch.testing.assert_close(confidence_B, expected, rtol=0, atol=1e-6)


# Where the official formula gives NaN


@pytest.mark.parametrize(
    "logits", [[200.0, 0.0], [3e38, -3e38], [0.0, -math.inf], [1e4, -1e4], [-3e38, -3e38 * 1.01]]
)
def test_saturated_logits_have_entropy_zero_and_leave_at_any_threshold_above(
    logits: list[float],
) -> None:
    assert entropy(torch.tensor([logits])).item() == 0.0
    assert decide([logits], 1e-30).leave_B.item()
    assert not decide([logits], 0.0).leave_B.item(), "S = 0 never leaves"
    assert decide([logits], 0.0).confidence_B.item() == 1.0


def test_entropy_is_never_below_zero() -> None:
    torch.manual_seed(0)
    for scale in (1e-3, 1.0, 30.0, 1e3, 1e20):
        entropy_B = entropy(torch.randn(2000, 3) * scale)
        assert (entropy_B >= 0).all(), f"logits of size {scale}: a row would leave at S = 0"


@pytest.mark.parametrize("logits", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_are_no_distribution_never_leave_early(logits: list[float]) -> None:
    decision = decide([logits, [9.0, 0.0]], LN_C)
    assert decision.leave_B.tolist() == [False, True], "nor do they keep another row back"
    assert decision.confidence_B[0].item() == 0.0


# The architecture


def test_every_exit_has_its_own_pooler_and_classifier(model: MultiExitModel) -> None:
    for part in ("pooler.weight", "classifier.weight"):
        pointers = {
            model.exits[str(depth)].get_parameter(part).data_ptr() for depth in range(1, N + 1)
        }
        assert len(pointers) == N, part


def test_a_head_reads_the_first_token_only() -> None:
    model = toy_model("deebert", n_layers=1)
    hidden_BTD = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    other_BTD = hidden_BTD.clone()
    other_BTD[:, 1:] = 7.0
    mask_BT = torch.ones(2, 4, dtype=torch.bool)
    branch = model.exits["1"]
    torch.testing.assert_close(
        branch(hidden_BTD, mask_BT, {})["logits"],
        branch(other_BTD, mask_BT, {})["logits"],
        rtol=0,
        atol=0,
    )


def test_thresholds_may_differ_from_exit_to_exit(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    knobs = {"threshold": (0.0, LN_C * 1.001, 0.0, 0.0, 0.0)}
    assert (whole(TorchLayers(model), inputs, knobs).depth_B == 2).all()


def test_the_knob_reaches_from_never_to_always(model: MultiExitModel) -> None:
    (knob,) = model.knobs
    assert (knob.name, knob.low, knob.never) == ("threshold", 0.0, 0.0)
    assert LN_C < knob.high < LN_C * 1.05
    assert never_exit(model.knobs, 3) == {"threshold": (0.0, 0.0, 0.0)}


def test_regression_is_refused_and_the_methods_that_can_are_named() -> None:
    with pytest.raises(ValueError, match=r"deebert has no rule for regression; .*pabee"):
        toy_model("deebert", task=TaskSpec("regression"))
