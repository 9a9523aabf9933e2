"""Past-Future against its paper and sheet, and on numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import subjects
import torch
from law import Outcome, cut_at, whole
from torch import Tensor, nn
from toy_models import mixed_knobs, toy_model

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.spec import StateField, TaskSpec
from offramp_model.exits import HeadSpec
from offramp_model.methods.past_future import PastFuture, PastFuturePolicy
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch

N = 5
# Float32 sums in another order; logits are of size 1 to 10.
TOLERANCE = 1e-4


@pytest.fixture
def model() -> MultiExitModel:
    return toy_model("past_future", n_layers=N, seed=1)


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(48)


def outcome(model: MultiExitModel, inputs: Activations[NumpyArray], threshold: float) -> Outcome:
    return whole(TorchLayers(model), inputs, {"threshold": (threshold,) * N})


def seen(model: MultiExitModel, inputs: Activations[NumpyArray]) -> dict[int, dict[str, Tensor]]:
    mask_BT = torch.from_numpy(mask_of(inputs.lengths_B))
    outputs: dict[int, dict[str, Tensor]] = model(to_torch(inputs).hidden_BTD, mask_BT)
    return outputs


def linear(head: nn.Module, name: str) -> nn.Linear:
    module = head.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def map_to(model: MultiExitModel, target: int) -> nn.Linear:
    """The map that imitates layer `target`, from the first exit."""
    return linear(model.exits["1"], f"maps.{target - 2}")


@torch.inference_mode()
def pooled_states(model: MultiExitModel, inputs: Activations[NumpyArray]) -> list[Tensor]:
    """c_1 ... c_L, each (B, D)."""
    acts, mask_BT = to_torch(inputs), torch.from_numpy(mask_of(inputs.lengths_B))
    hidden_BTD, out = model.backbone.embed(acts.hidden_BTD), []
    for depth in range(1, N + 1):
        hidden_BTD = model.backbone.run_layers(hidden_BTD, mask_BT, depth - 1, depth)
        out.append(torch.tanh(linear(model.exits[str(depth)], "pooler")(hidden_BTD[:, 0])))
    return out


@torch.inference_mode()
def by_hand(model: MultiExitModel, pooled: list[Tensor], exit: int) -> tuple[Tensor, ...]:
    """(past_BC, future_BC, gate_BC) at an exit, from all pooled states kept: the sheet's formulas."""
    c_i, n_classes = pooled[exit - 1], model.spec.task.answer_width
    past_BC, gates, future_BC = torch.zeros(()), [], torch.zeros(len(c_i), n_classes)
    for j in range(1, N + 1):
        classifier = linear(model.exits[str(j)], "classifier")
        if j <= exit:
            both_BE = classifier(pooled[j - 1])
            past_BC = past_BC + both_BE[:, :n_classes]
            gates.append(both_BE[:, n_classes:])
        else:
            future_BC = future_BC + classifier(torch.tanh(map_to(model, j)(c_i)))[:, :n_classes]
    mean_BC = torch.stack(gates).mean(dim=0)
    gate_BC = torch.sigmoid(linear(model.exits[str(exit)], "gate")(torch.tanh(mean_BC)))
    return past_BC, future_BC, gate_BC


# The sheet's "How to test"


@torch.no_grad()
def test_at_zero_every_sample_uses_the_last_layer_which_has_no_future(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    got = outcome(model, inputs, 0.0)
    assert (got.depth_B == N).all()
    past_BC, future_BC, gate_BC = by_hand(model, pooled_states(model, inputs), N)
    assert (future_BC == 0).all()
    np.testing.assert_allclose(got.answers, 2 * gate_BC * past_BC, rtol=0, atol=TOLERANCE)
    for target in range(2, N + 1):
        map_to(model, target).weight.normal_()
    np.testing.assert_array_equal(outcome(model, inputs, 0.0).answers, got.answers)


@torch.inference_mode()
def test_running_sums_give_the_logits_of_all_pooled_states(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    pooled, outputs = pooled_states(model, inputs), seen(model, inputs)
    for exit in range(1, N + 1):
        past_BC, future_BC, gate_BC = by_hand(model, pooled, exit)
        expected = 2 * gate_BC * past_BC + (2 - 2 * gate_BC) * future_BC
        torch.testing.assert_close(outputs[exit]["logits"], expected, rtol=1e-5, atol=TOLERANCE)
        assert exit == N or future_BC.abs().mean() > 0.1, "the future must matter here"


@torch.no_grad()
def test_with_true_imitations_an_exit_differs_from_another_by_its_gate_alone(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    """Past and future then add up to the same evidence everywhere; an even gate shows it."""
    one = inputs.take(np.array([0]))
    pooled = pooled_states(model, one)
    for target in range(2, N + 1):
        map_to(model, target).weight.zero_()
        # Within tanh's float32 range: the toy's states come close to 1.
        true_D = pooled[target - 1][0].clamp(-0.99999, 0.99999)
        map_to(model, target).bias.copy_(true_D.atanh())
    sums = []
    for exit in range(1, N + 1):
        past_BC, future_BC, gate_BC = by_hand(model, pooled, exit)
        sums.append(past_BC + future_BC)
        expected = 2 * gate_BC * past_BC + (2 - 2 * gate_BC) * (sums[0] - past_BC)
        actual = seen(model, one)[exit]["logits"]
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)
    gate = linear(model.exits["1"], "gate")
    gate.weight.zero_()
    gate.bias.zero_()
    for outputs in seen(model, one).values():
        # What was clamped makes up for 1e-5 of each of 32 numbers, times weights up to 0.5.
        torch.testing.assert_close(outputs["logits"], sums[0], rtol=0, atol=2e-3)


def test_the_law_holds_at_every_split_point(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    layers, knobs = TorchLayers(model), mixed_knobs(model)
    cuts = {depth: model.cut(depth) for depth in range(N)}
    expected = whole(layers, inputs, knobs)
    assert len(set(expected.depth_B.tolist())) > 2
    for k in range(N + 1):
        assert cut_at(k, layers, inputs, knobs, cuts).same_as(expected)


# By hand


@torch.inference_mode()
def test_a_model_worked_out_by_hand() -> None:
    """One number wide, two layers, two classes."""
    spec = HeadSpec(TaskSpec("classification", ("a", "b")), 1, 2, (1, 2), dropout=0.0)

    def make(n_out: int, weight: list[float]) -> nn.Linear:
        layer = nn.Linear(1, n_out) if len(weight) == n_out else nn.Linear(n_out, n_out)
        layer.weight.copy_(torch.tensor(weight).reshape(layer.weight.shape))
        layer.bias.zero_()
        return layer

    # Of each state: two numbers for the logits, two for the gate.
    classifiers = [make(4, [1.0, -1.0, 2.0, 0.0]), make(4, [2.0, 0.0, 0.0, 2.0])]
    maps = [make(1, [5.0]), make(1, [2.0])]  # that of layer 1 imitates nothing
    gate = make(2, [1.0, 0.0, 0.0, 1.0])
    policy, mask_BT = PastFuturePolicy(2), torch.ones(1, 1, dtype=torch.bool)
    state, logits = policy.start(mask_BT), []
    for depth, pooled in ((1, 0.5), (2, -0.5)):
        branch = PastFuture(spec, depth, classifiers, maps, gate)
        branch.pooler.weight.fill_(1.0)
        branch.pooler.bias.zero_()
        outputs = branch.eval()(torch.tensor([[[pooled]]]).atanh(), mask_BT, state)
        state = policy.decide(outputs, state, {"threshold": torch.tensor(0.0)}, depth).state
        logits.append(outputs["logits"][0].tolist())

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    # Layer 1: past (0.5, -0.5), gate sigmoid(tanh(1, 0)); layer 2 imitated: tanh(2 * 0.5) = 0.7616.
    g = sigmoid(math.tanh(1.0))
    assert g == pytest.approx(0.6817, abs=1e-4)
    first = [2 * g * 0.5 + (2 - 2 * g) * 2 * math.tanh(1.0), 2 * 0.5 * -0.5]
    assert first == pytest.approx([1.6515, -0.5], abs=1e-3)
    assert logits[0] == pytest.approx(first, abs=1e-5)
    # Layer 2: past (0.5 - 1, -0.5 + 0), gate of the mean of (1, 0) and (0, -1); no future.
    g = sigmoid(math.tanh(0.5))
    assert logits[1] == pytest.approx([2 * g * -0.5, 2 * (1 - g) * -0.5], abs=1e-5)
    assert state["sums"][0].tolist() == pytest.approx([-0.5, -0.5, 1.0, -1.0], abs=1e-6)


# The pitfalls, and what is trained


def test_maps_belong_to_targets_and_are_shared_by_all_sources(model: MultiExitModel) -> None:
    for source in range(1, N):
        maps = model.exits[str(source)].get_submodule("maps")
        assert isinstance(maps, nn.ModuleList)
        assert len(maps) == N - source
        for offset, a_map in enumerate(maps):
            assert a_map is map_to(model, source + 1 + offset)
    assert len({id(map_to(model, target)) for target in range(2, N + 1)}) == N - 1
    poolers = [linear(model.exits[str(depth)], "pooler") for depth in range(1, N + 1)]
    assert len({id(pooler) for pooler in poolers}) == N, "each layer has a pooler of its own"


@torch.no_grad()
def test_another_map_changes_the_exits_before_its_target_alone(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    before = seen(model, inputs)
    map_to(model, 3).weight.neg_()
    after = seen(model, inputs)
    changed = [bool((after[d]["logits"] != before[d]["logits"]).any()) for d in range(1, N + 1)]
    assert changed == [True, True, False, False, False]


def without_dropout(model: MultiExitModel) -> MultiExitModel:
    """Exits in training mode, all dropout off."""
    model.eval()
    for module in model.exits.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.exits.train()
    return model


def test_training_computes_the_logits_of_inference(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    expected = seen(model, inputs)
    assert {name for outputs in expected.values() for name in outputs} == {"logits", "sums"}
    outputs = seen(without_dropout(model), inputs)
    for depth in range(1, N + 1):
        for name, value in expected[depth].items():
            torch.testing.assert_close(outputs[depth][name], value)


@torch.no_grad()
def test_training_shows_each_layers_state_and_what_exits_take_later_ones_for(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    pooled = pooled_states(model, inputs)
    outputs = seen(without_dropout(model), inputs)
    for depth in range(1, N + 1):
        torch.testing.assert_close(outputs[depth]["pooled"], pooled[depth - 1])
        assert ("imitated" in outputs[depth]) == (depth < N)
        for offset in range(N - depth):
            torch.testing.assert_close(
                outputs[depth]["imitated"][:, offset],
                torch.tanh(map_to(model, depth + 1 + offset)(pooled[depth - 1])),
            )


def test_an_exit_teaches_its_own_layers_state_and_earlier_classifiers_but_no_earlier_state(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    outputs = seen(without_dropout(model), inputs)
    outputs[3]["logits"].square().sum().backward()  # type: ignore[no-untyped-call]
    taught = {
        name: [linear(model.exits[str(d)], name).weight.grad is not None for d in range(1, N + 1)]
        for name in ("pooler", "classifier")
    }
    assert taught["pooler"] == [False, False, True, False, False]
    assert taught["classifier"] == [True] * N, "later ones by way of the imitated future"
    assert [map_to(model, target).weight.grad is not None for target in range(2, N + 1)] == [
        False, False, True, True,
    ]  # fmt: skip


def test_the_state_is_two_sums_whatever_the_depth() -> None:
    policy = PastFuturePolicy(7)
    assert [policy.state_fields(depth) for depth in (1, 4)] == [
        {"sums": StateField("float32", (14,))}
    ] * 2


def test_the_comparison_is_strict() -> None:
    policy = PastFuturePolicy(2)
    outputs = {"logits": torch.zeros(1, 2), "sums": torch.zeros(1, 4)}
    for threshold, leaves in ((math.log(2), False), (math.log(2) + 1e-6, True)):
        knobs = {"threshold": torch.tensor(threshold)}
        assert policy.decide(outputs, {}, knobs, 1).leave_B.tolist() == [leaves]
