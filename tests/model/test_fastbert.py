"""FastBERT against its paper and sheet, and on numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import subjects
import torch
from law import Outcome, whole
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy_models import LABELS, toy_bundle, toy_inputs, toy_layers, toy_model

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import Knobs, run
from offramp_common.spec import TaskSpec, never_exit
from offramp_edge.runtime import OnnxLayers
from offramp_model.backbones import backbone_from_config
from offramp_model.exits import Decision, HeadSpec
from offramp_model.export import add_graphs, capture
from offramp_model.methods import METHODS
from offramp_model.methods.fastbert import SpeedPolicy, StudentClassifier, normalised_entropy
from offramp_model.split_model import MultiExitModel, TorchLayers

N = 5
TASK = TaskSpec("classification", LABELS)


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return toy_model("fastbert", n_layers=N, seed=3)


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(48, below=30)


def at(speed: float) -> Knobs:
    return {"speed": (speed,) * N}


def outcome(model: MultiExitModel, inputs: Activations[NumpyArray], speed: float) -> Outcome:
    return whole(TorchLayers(model), inputs, at(speed))


def decide(logits: list[list[float]], speed: float) -> Decision:
    knobs = {"speed": torch.tensor(speed)}
    return SpeedPolicy().decide({"logits": torch.tensor(logits)}, {}, knobs, 1)


# The sheet's "How to test"


@torch.inference_mode()
def test_below_speed_zero_every_sample_gets_the_teachers_answer_bit_for_bit(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    got = outcome(model, inputs, -1.0)
    mask_BT = torch.from_numpy(mask_of(inputs.lengths_B))
    hidden_BTD = model.backbone.embed(torch.from_numpy(inputs.hidden_BTD))
    hidden_BTD = model.backbone.run_layers(hidden_BTD, mask_BT, 0, N)
    teacher_BC = model.exits[str(N)](hidden_BTD, mask_BT, {})["logits"]
    assert (got.depth_B == N).all()
    np.testing.assert_array_equal(got.answers, teacher_BC.numpy())


def test_at_speed_one_every_sample_leaves_at_layer_one(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    assert (outcome(model, inputs, 1.0).depth_B == 1).all()
    # Uniform to the last bit and beyond: the entropy as a share of ln C may be rounded to above 1.
    for n_classes in range(2, 200):
        assert decide([[0.1] * n_classes], 1.0).leave_B.item(), n_classes


def test_a_batch_from_which_rows_leave_gives_each_row_what_it_gets_alone(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    """Rows leave between rows of other lengths: their masks must go with them."""
    layers, knobs = TorchLayers(model), at(0.6)
    together = whole(layers, inputs, knobs)
    assert len(set(together.depth_B.tolist())) > 2
    for row in range(inputs.batch_size):
        alone = whole(layers, inputs.take(np.array([row])), knobs)
        assert alone.depth_B.item() == together.depth_B[row]
        # Float32 sums in another order; toy logits are of size 1 to 5.
        np.testing.assert_allclose(alone.answers[0], together.answers[row], rtol=0, atol=1e-4)


def test_a_classifier_costs_far_less_than_a_layer() -> None:
    """BERT-base and 128 tokens. The paper counts 46 MFLOPs against about 1.8 GFLOPs: a fortieth."""
    backbone = backbone_from_config(
        {
            "model_type": "bert",
            "vocab_size": 8,
            "num_hidden_layers": 1,
            "attn_implementation": "eager",
        }
    )
    branch = StudentClassifier(HeadSpec(TASK, 768, 1, (1,), METHODS["fastbert"].settings)).eval()
    hidden_BTD, mask_BT = torch.zeros(1, 128, 768), torch.ones(1, 128, dtype=torch.bool)
    with torch.no_grad(), FlopCounterMode(display=False) as of_layer:
        backbone.run_layers(hidden_BTD, None, 0, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as of_branch:
        branch(hidden_BTD, mask_BT, {})
    assert 1.6e9 < of_layer.get_total_flops() < 2.0e9
    assert of_branch.get_total_flops() < of_layer.get_total_flops() / 40


# Worked out by hand


def test_uncertainty_is_the_entropy_as_a_share_of_ln_c() -> None:
    # (-0.9 ln 0.9 - 0.1 ln 0.1) / ln 2 = 0.3250830 / 0.6931472; (1.5 ln 2) / ln 4 = 0.75
    assert normalised_entropy(torch.tensor([[0.9, 0.1]]).log()).item() == pytest.approx(0.4689956)
    quarters = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    assert normalised_entropy(quarters).item() == pytest.approx(0.75, abs=1e-6)
    assert normalised_entropy(torch.zeros(1, 151)).item() == pytest.approx(1.0, abs=1e-6)


def test_a_sample_leaves_at_the_threshold_and_not_above_it() -> None:
    logits = [[1.0, 0.0]]
    exactly = normalised_entropy(torch.tensor(logits)).item()
    assert decide(logits, exactly).leave_B.item()
    assert not decide(logits, exactly - 1e-6).leave_B.item()


def test_rows_leave_one_by_one_and_faster_at_a_higher_speed() -> None:
    # Shares of ln 2: 1, 0.840, 0.058.
    rows = [[0.0, 0.0], [1.0, 0.0], [5.0, 0.0]]
    assert decide(rows, 0.05).leave_B.tolist() == [False, False, False]
    assert decide(rows, 0.06).leave_B.tolist() == [False, False, True]
    assert decide(rows, 0.85).leave_B.tolist() == [False, True, True]
    assert decide(rows, 1.00).leave_B.tolist() == [True, True, True]


def test_no_sample_leaves_later_at_a_higher_speed(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    depths = [outcome(model, inputs, step / 20).depth_B for step in range(21)]
    for slower, faster in itertools.pairwise(depths):
        assert (faster <= slower).all()
    assert len({float(depth_B.mean()) for depth_B in depths}) > 5, "speed must make a difference"


def test_saturated_logits_leave_at_speed_zero_and_not_below() -> None:
    for logits in ([200.0, 0.0], [3e38, -3e38], [0.0, -math.inf]):
        assert decide([logits], 0.0).leave_B.item()
        assert not decide([logits], -1.0).leave_B.item()
        assert decide([logits], 0.0).confidence_B.item() == 1.0


@pytest.mark.parametrize("logits", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_are_no_distribution_never_leave_early(logits: list[float]) -> None:
    decision = decide([logits, [9.0, 0.0]], 1.0)
    assert decision.leave_B.tolist() == [False, True], "nor do they keep another row back"
    assert decision.confidence_B[0].item() == 0.0


def test_nothing_is_carried_and_the_knob_reaches_from_never_to_always(
    model: MultiExitModel,
) -> None:
    assert SpeedPolicy().state_fields(3) == {}
    (knob,) = model.knobs
    assert (knob.name, knob.low, knob.high, knob.never) == ("speed", 0.0, 1.0, -1.0)
    assert never_exit(model.knobs, 2) == {"speed": (-1.0, -1.0)}


# The classifier


def make_student(
    width: int, heads: int, backbone: int, pooling: str = "first", task: TaskSpec = TASK
) -> StudentClassifier:
    torch.manual_seed(5)
    settings = {"pooling": pooling, "width": width, "heads": heads}
    return StudentClassifier(HeadSpec(task, backbone, 1, (1,), settings)).eval()


@torch.inference_mode()
def test_the_classifier_on_two_tokens_worked_out_by_hand() -> None:
    two = TaskSpec("classification", ("a", "b"))
    branch = make_student(2, 1, 2, task=two)
    for layer in branch.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    # tanh gives (0.5, 0) and (0, 0.5). The first token asks: scores 0.25 / sqrt 2 = 0.1767767 and 0,
    # shares 1.1933648 / 2.1933648 = 0.5440795 and 0.4559205, together (0.2720397, 0.2279603), and tanh.
    hidden_BTD = torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]).atanh()
    logits_BC = branch(hidden_BTD, torch.ones(1, 2, dtype=torch.bool), {})["logits"]
    expected = torch.tensor([[0.2655216, 0.2240916]])
    torch.testing.assert_close(logits_BC, expected, rtol=0, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_classifier_is_multi_head_attention_between_dense_layers(pooling: str) -> None:
    """Compared with torch's own attention, over rows of different length."""
    branch = make_student(32, 2, 48, pooling)
    attention = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    three = (branch.query, branch.key, branch.value)
    attention.in_proj_weight.copy_(torch.cat([layer.weight for layer in three]))
    attention.in_proj_bias.copy_(torch.cat([layer.bias for layer in three]))
    attention.out_proj.load_state_dict(branch.joined.state_dict())
    hidden_BTD = 2 * torch.randn(4, 9, 48)
    mask_BT = torch.from_numpy(mask_of(np.array([9, 1, 4, 7])))
    x_BTW = torch.tanh(branch.narrow(hidden_BTD))
    attended_BTW, _ = attention(x_BTW, x_BTW, x_BTW, key_padding_mask=~mask_BT)
    if pooling == "first":
        pooled_BW = attended_BTW[:, 0]
    else:
        rows = zip(attended_BTW, (9, 1, 4, 7), strict=True)
        pooled_BW = torch.stack([row_TW[:length].mean(dim=0) for row_TW, length in rows])
    expected = branch.classifier(torch.tanh(branch.dense(pooled_BW)))
    got = branch(hidden_BTD, mask_BT, {})["logits"]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_padding_counts_for_nothing_even_where_it_is_no_number() -> None:
    hidden_BTD = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    mask_BT = torch.from_numpy(mask_of(np.array([5, 2])))
    broken_BTD = torch.where(mask_BT.unsqueeze(-1), hidden_BTD, math.nan)
    for pooling in ("first", "mean"):
        branch = make_student(16, 2, 24, pooling)
        expected = branch(hidden_BTD[1:, :2], mask_BT[1:, :2], {})["logits"]
        for padded_BTD in (hidden_BTD, broken_BTD):
            got = branch(padded_BTD, mask_BT, {})["logits"]
            torch.testing.assert_close(got[1:], expected, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_the_classifier_reads_all_tokens_and_not_the_first_alone() -> None:
    branch = make_student(16, 2, 24)
    hidden_BTD = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1))
    other_BTD = hidden_BTD.clone()
    other_BTD[:, 3] += 1.0
    mask_BT = torch.ones(1, 5, dtype=torch.bool)
    difference = (
        branch(hidden_BTD, mask_BT, {})["logits"] - branch(other_BTD, mask_BT, {})["logits"]
    )
    assert difference.abs().max() > 1e-3


def test_no_two_exits_share_a_weight_and_the_teacher_is_a_classifier_like_the_others(
    model: MultiExitModel,
) -> None:
    pointers = [parameter.data_ptr() for parameter in model.exits.parameters()]
    assert len(set(pointers)) == len(pointers) == N * 14
    shapes = [[p.shape for p in head.parameters()] for head in model.exits.values()]
    assert all(shape == shapes[0] for shape in shapes)


def test_the_classifier_is_as_wide_as_set_or_as_the_backbone_where_that_is_narrower() -> None:
    assert make_student(128, 2, 384).dense.in_features == 128
    assert make_student(128, 2, 32).dense.in_features == 32
    with pytest.raises(ValueError, match="width 32 and heads 3: heads must divide the width"):
        make_student(128, 3, 32)


def test_regression_is_refused() -> None:
    with pytest.raises(ValueError, match="fastbert has no rule for regression"):
        toy_model("fastbert", task=TaskSpec("regression"))


# On the device


def test_a_graph_has_no_mask_left_in_its_classifier() -> None:
    toy = toy_model("fastbert", n_layers=2)
    kinds = [node.op_type for node in capture(toy, 1).operators]
    assert "ConstantOfShape" not in kinds, "a mask is made"
    # The policy's own two: a share above 1, and a NaN's confidence.
    assert kinds.count("Where") == 2


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_graphs_of_wide_classifiers_answer_as_torch_does(tmp_path: Path, pooling: str) -> None:
    """128 is the least width at which matrices are stored, and multiplied, as int8."""
    settings = {"pooling": pooling}
    bundle = add_graphs(toy_bundle(tmp_path, "fastbert", width=128, n_layers=2, settings=settings))
    assert "exits.1.query.weight" in bundle.manifest.stored
    inputs, never = toy_inputs(bundle, [5, 12, 1, 9, 30, 7]), at(-1.0)
    expected = whole(toy_layers(bundle), inputs, never)
    fp32, int8 = (
        Outcome.of(run(OnnxLayers(bundle, precision), inputs, 2, never).left)
        for precision in ("fp32", "int8")
    )
    # Sums in another order, through sharpened heads.
    np.testing.assert_allclose(fp32.answers, expected.answers, rtol=0, atol=1e-3)
    # Activations in 8 bits. A wrong scale or zero point gives 1 and more.
    wrong = np.linalg.norm(int8.answers - expected.answers)
    assert wrong < 0.2 * np.linalg.norm(expected.answers)
