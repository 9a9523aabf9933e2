"""The Right Tool against its paper and sheet, and on numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import subjects
import torch
from law import Outcome, whole
from torch import Tensor, nn
from toy_models import mixed_knobs, toy_model, toy_tokenizer

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import Knobs, run
from offramp_common.spec import StateField, TaskSpec
from offramp_edge.runtime import OnnxLayers
from offramp_model.exits import HeadSpec
from offramp_model.export import add_graphs
from offramp_model.methods.right_tool import CalibratedPolicy, MixedClassifier, Mixing, carried
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch
from offramp_model.store import About, load_model, save_model

N = 6
NEVER = 2.0
# Float32 sums of up to six vectors in another order; logits are of size 1 to 10.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(48)


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return calibrated(toy_model("right_tool", n_layers=N, seed=1))


def calibrated(model: MultiExitModel) -> MultiExitModel:
    """Every exit with a temperature of its own."""
    for depth in model.spec.exits:
        model.exits[str(depth)].get_buffer("temperature").fill_(0.5 + 0.25 * depth)
    return model


def outcome(model: MultiExitModel, inputs: Activations[NumpyArray], threshold: float) -> Outcome:
    knobs: Knobs = {"threshold": (threshold,) * model.n_layers}
    return whole(TorchLayers(model), inputs, knobs)


def only_last(model: MultiExitModel) -> MultiExitModel:
    """The same weights with the last exit alone."""
    n = model.n_layers
    last = toy_model("right_tool", n_layers=n, exits=[n], task=model.spec.task, seed=1)
    last.backbone = model.backbone
    own = dict(model.exits[str(n)].state_dict())
    own["mixing.weight"] = own["mixing.weight"][-1:]
    last.exits[str(n)].load_state_dict(own)
    return last


@torch.inference_mode()
def by_hand(model: MultiExitModel, inputs: Activations[NumpyArray]) -> dict[int, Tensor]:
    """Each exit's calibrated logits from the pooled states of all layers, kept to the end: the sheet's
    steps 2 and 3."""
    acts = to_torch(inputs)
    mask_BT = torch.from_numpy(mask_of(inputs.lengths_B))
    hidden_BTD = model.backbone.embed(acts.hidden_BTD)
    pooled, logits = [], {}
    for depth in range(1, model.n_layers + 1):
        hidden_BTD = model.backbone.run_layers(hidden_BTD, mask_BT, depth - 1, depth)
        head = model.exits[str(depth)]
        pooler = head.get_submodule("pooler")
        pooled.append(torch.tanh(pooler(hidden_BTD[:, 0])))
        if depth in model.spec.exits:
            row = head.get_parameter("mixing.weight")[model.spec.exits.index(depth), :depth]
            mix_BD = torch.zeros_like(pooled[0])
            for share, pooled_BD in zip(row / row.norm(), pooled, strict=True):
                mix_BD += share * pooled_BD
            logits[depth] = head.get_submodule("classifier")(mix_BD) / head.get_buffer(
                "temperature"
            )
    return logits


# The sheet's "How to test"


def test_above_one_every_sample_gets_the_last_classifiers_answer(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    got = outcome(model, inputs, NEVER)
    assert (got.depth_B == N).all()
    # Alone, the last exit's sums are carried from layer 2 on; beside others, from layer 4.
    expected = outcome(only_last(model), inputs, NEVER)
    np.testing.assert_allclose(got.answers, expected.answers, rtol=0, atol=TOLERANCE)


def test_at_zero_every_sample_leaves_at_the_first_exit(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    assert (outcome(model, inputs, 0.0).depth_B == 1).all()


def test_a_temperature_changes_confidence_and_no_prediction(
    inputs: Activations[NumpyArray],
) -> None:
    model = toy_model("right_tool", n_layers=N, seed=1)
    for threshold in (0.0, NEVER):
        for factor in (0.3, 3.0):
            before = outcome(model, inputs, threshold)
            for depth in model.spec.exits:
                model.exits[str(depth)].get_buffer("temperature").mul_(factor)
            after = outcome(model, inputs, threshold)
            np.testing.assert_array_equal(after.depth_B, before.depth_B)
            np.testing.assert_array_equal(after.answers.argmax(1), before.answers.argmax(1))
            np.testing.assert_allclose(after.answers, before.answers / factor, rtol=1e-5)
            changed = after.confidence_B - before.confidence_B
            # A row that is sure of one class, or torn between all, hardly moves.
            assert ((changed < 0) == (factor > 1))[np.abs(changed) > 1e-6].all()
            assert (np.abs(changed) > 0.01).mean() > 0.5


@pytest.mark.parametrize("exits", [range(1, N + 1), (2, 3, N), (1, N), (N,), (3, 4, 5, N)])
@torch.inference_mode()
def test_what_is_carried_gives_the_logits_of_all_pooled_states(
    exits: tuple[int, ...], inputs: Activations[NumpyArray]
) -> None:
    model = calibrated(toy_model("right_tool", n_layers=N, exits=exits, seed=1))
    expected = by_hand(model, inputs)
    acts = to_torch(inputs)
    seen = model(acts.hidden_BTD, torch.from_numpy(mask_of(inputs.lengths_B)))
    assert set(expected) == set(exits)
    for depth, logits_BC in expected.items():
        torch.testing.assert_close(seen[depth]["logits"], logits_BC, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_pooled_states_and_partial_sums_lead_to_the_same_logits(model: MultiExitModel) -> None:
    """One layer, told of the layers before it either way."""
    torch.manual_seed(0)
    width = model.spec.width
    hidden_BTD, mask_BT = torch.randn(9, 5, width), torch.ones(9, 5, dtype=torch.bool)
    for depth in (4, 5, 6):  # where this model carries sums on, and so can be told both ways
        branch = model.exits[str(depth)]
        assert isinstance(branch, MixedClassifier)
        pooled_BLD = torch.randn(9, depth - 1, width).tanh()
        # of the exits from here on, over the layers before
        sums_BKD = branch.mixing()[depth - 1 :, : depth - 1] @ pooled_BLD
        a = branch(hidden_BTD, mask_BT, {"pooled": pooled_BLD})
        b = branch(hidden_BTD, mask_BT, {"sums": sums_BKD})
        assert set(a) == set(b)
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=0, atol=TOLERANCE)


def test_no_sample_leaves_earlier_at_a_higher_threshold(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    thresholds = [0.0, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0, NEVER]
    depths = [outcome(model, inputs, threshold).depth_B for threshold in thresholds]
    for lower, higher in itertools.pairwise(depths):
        assert (higher >= lower).all()
    assert len({float(depth_B.mean()) for depth_B in depths}) > 3, "it must make a difference"


# By hand, and the pitfalls


def small() -> tuple[nn.Linear, Mixing, HeadSpec]:
    """Two numbers wide, three layers, exits behind the first and the last, a pooler that is only tanh."""
    spec = HeadSpec(TaskSpec("classification", ("a", "b")), 2, 3, (1, 3), dropout=0.0)
    pooler, mixing = nn.Linear(2, 2), Mixing(spec)
    with torch.no_grad():
        pooler.weight.copy_(torch.eye(2))
        pooler.bias.zero_()
        # 9 stands where an exit has no layer.
        mixing.weight.copy_(torch.tensor([[-2.0, 9.0, 9.0], [3.0, 0.0, 4.0]]))
    return pooler, mixing, spec


@torch.inference_mode()
def test_a_model_worked_out_by_hand() -> None:
    pooler, mixing, spec = small()
    assert mixing().tolist() == [[-1.0, 0.0, 0.0], [pytest.approx(0.6), 0.0, pytest.approx(0.8)]]
    policy = CalibratedPolicy((1, 3), 2, 2)
    state: dict[str, Tensor] = {}
    knobs = {"threshold": torch.tensor(0.7)}
    mask_BT = torch.ones(1, 1, dtype=torch.bool)
    logits, confidence, left = {}, {}, []
    for depth, pooled in ((1, (0.5, 0.0)), (2, (0.0, 0.5)), (3, (0.5, 0.5))):
        branch = MixedClassifier(spec, depth, pooler, mixing)
        if depth in spec.exits:
            branch.classifier.weight.copy_(torch.eye(2))
            branch.classifier.bias.zero_()
            branch.get_buffer("temperature").fill_({1: 1.0, 3: 0.25}[depth])
        outputs = branch(torch.tensor([[pooled]]).atanh(), mask_BT, state)
        decision = policy.decide(outputs, state, knobs, depth)
        state = decision.state
        if depth in spec.exits:
            logits[depth] = outputs["logits"][0].tolist()
            confidence[depth] = decision.confidence_B.item()
        left.append(decision.leave_B.item())
    # m_1 = -q_1. m_3 = 0.6 q_1 + 0.8 q_3 = (0.7, 0.4), and four times that at a temperature of 1/4.
    assert logits[1] == pytest.approx([-0.5, 0.0], abs=1e-6)
    assert logits[3] == pytest.approx([2.8, 1.6], abs=1e-6)
    assert confidence[1] == pytest.approx(1 / (1 + math.exp(-0.5)))  # 0.622 < 0.7
    assert confidence[3] == pytest.approx(1 / (1 + math.exp(-1.2)))  # 0.769
    assert left == [False, False, True]
    assert state == {}


def test_a_mix_is_of_unit_length_whatever_training_makes_of_it_and_it_is_trained() -> None:
    model = toy_model("right_tool", n_layers=4, exits=(2, 4), seed=1).train()
    ids, mask = torch.randint(5, 90, (8, 6, 1)), torch.ones(8, 6, dtype=torch.bool)
    mixing = model.exits["1"].get_submodule("mixing")
    assert isinstance(mixing, Mixing)
    optimiser, before = torch.optim.SGD(model.exits.parameters(), lr=1.0), mixing().detach()
    outputs = model(ids, mask)
    (outputs[2]["logits"].square().sum() + outputs[4]["logits"].square().sum()).backward()
    optimiser.step()
    after = mixing().detach()
    torch.testing.assert_close(after.norm(dim=1), torch.ones(2))
    assert (after - before).abs().amax(dim=1).min() > 1e-3, "every exit's mix moves"
    assert (after[0, 2:] == 0).all(), "layers above an exit are no part of its mix"


def test_all_layers_share_one_pooler_and_one_matrix_of_mixes(model: MultiExitModel) -> None:
    heads = list(model.exits.values())
    for name in ("pooler.weight", "mixing.weight"):
        assert len({head.get_parameter(name).data_ptr() for head in heads}) == 1
    assert len({head.get_parameter("classifier.weight").data_ptr() for head in heads}) == N


def test_a_temperature_is_one_until_fitted_and_no_parameter() -> None:
    model = toy_model("right_tool", n_layers=N, seed=1)
    for depth in model.spec.exits:
        assert model.exits[str(depth)].get_buffer("temperature").item() == 1.0
    assert not any("temperature" in name for name, _ in model.named_parameters())


def decide(logits: list[float], threshold: float) -> tuple[bool, float]:
    policy = CalibratedPolicy((1, 2), 2, len(logits))
    outputs = {"logits": torch.tensor([logits]), "pooled": torch.zeros(1, 1, 2)}
    decision = policy.decide(outputs, {}, {"threshold": torch.tensor(threshold)}, 1)
    return bool(decision.leave_B.item()), decision.confidence_B.item()


def test_the_comparison_is_not_strict_and_never_means_never() -> None:
    assert decide([0.0, 0.0], 0.5) == (True, 0.5)
    # In float32 the probability is 1 to the last bit.
    assert decide([200.0, 0.0], 1.0) == (True, 1.0)
    assert decide([200.0, 0.0], NEVER) == (False, 1.0)


def test_below_one_over_the_number_of_classes_everything_leaves() -> None:
    assert decide([0.0, 0.0, 0.0, 0.0, 0.0], 0.199)[0]
    assert not decide([0.0, 0.0, 0.0, 0.0, 0.0], 0.201)[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number_does_not_leave(bad: float) -> None:
    assert decide([bad, 1.0, 0.0], 0.0) == (False, 0.0)


# What is carried


def test_the_smaller_form_is_carried_and_nothing_behind_the_last_exit() -> None:
    every = tuple(range(1, 7))
    assert [carried(every, depth) for depth in every] == [
        ("pooled", 1), ("pooled", 2), ("pooled", 3), ("sums", 2), ("sums", 1), ("sums", 0),
    ]  # fmt: skip
    four = (1, 5, 13, 24)  # BERT-large's
    assert [carried(four, depth) for depth in (1, 3, 4, 5, 13)] == [
        ("pooled", 1), ("pooled", 3), ("sums", 3), ("sums", 2), ("sums", 1),
    ]  # fmt: skip
    policy = CalibratedPolicy(every, 32, 5)
    assert policy.state_fields(3) == {"pooled": StateField("float32", (3, 32))}
    assert policy.state_fields(4) == {"sums": StateField("float32", (2, 32))}
    assert policy.state_fields(6) == {}


@pytest.mark.slow
def test_temperatures_are_in_the_bundle_and_in_its_graphs(
    model: MultiExitModel, inputs: Activations[NumpyArray], tmp_path: Path
) -> None:
    about = About("toy", 64, 1, operating_points={"fp32": mixed_knobs(model)})
    bundle = add_graphs(save_model(tmp_path, model, toy_tokenizer(), about), ["fp32"])
    loaded = load_model(bundle)
    for depth in loaded.spec.exits:
        assert loaded.exits[str(depth)].get_buffer("temperature").item() == 0.5 + 0.25 * depth
    knobs = bundle.knobs("fp32")
    want = whole(TorchLayers(model), inputs, knobs)
    got = Outcome.of(run(OnnxLayers(bundle), inputs, N, knobs).left)
    np.testing.assert_array_equal(got.depth_B, want.depth_B)
    np.testing.assert_allclose(got.answers, want.answers, rtol=0, atol=TOLERANCE)
    assert len(set(want.depth_B.tolist())) > 2
