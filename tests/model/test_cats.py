"""CATs' rule, what its meta classifier reads, and what it carries, against paper and sheet."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import subjects
import torch
from law import Outcome, cut_at, whole
from subjects import close
from torch import Tensor
from toy_models import LABELS, mixed_knobs, toy_model, toy_tokenizer

from offramp_common.activations import Activations, NumpyArray
from offramp_common.runner import run
from offramp_common.spec import StateField, TaskSpec
from offramp_edge.runtime import OnnxLayers
from offramp_model.export import add_graphs
from offramp_model.methods.cats import ConsistencyPolicy, MetaBranch
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch
from offramp_model.store import About, load_model, save_model

N, WIDTH, C, NARROW = 6, 32, len(LABELS), 32
CLASSES, NUMBER = TaskSpec("classification", LABELS), TaskSpec("regression")


@pytest.fixture(scope="module", params=[CLASSES, NUMBER], ids=lambda task: task.kind)
def model(request: pytest.FixtureRequest) -> MultiExitModel:
    made = toy_model("cats", n_layers=N, width=WIDTH, task=request.param, seed=1)
    for depth in range(1, N):  # as after the fit: no two alike, none of them 1
        head(made, depth).temperature.fill_(0.5 + 0.2 * depth)
    return made


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(64)


def head(model: MultiExitModel, depth: int) -> MetaBranch:
    found = model.exits[str(depth)]
    assert isinstance(found, MetaBranch)
    return found


@torch.no_grad()
def play(
    model: MultiExitModel, hidden_LBTD: Tensor
) -> tuple[dict[int, dict[str, Tensor]], dict[int, Tensor]]:
    """(outputs by depth, what each exit's meta classifier was given) for these hidden states."""
    given: dict[int, Tensor] = {}
    hooks = [
        head(model, depth).meta.register_forward_pre_hook(
            lambda _, inputs, depth=depth: given.update({depth: inputs[0]})
        )
        for depth in range(1, N)
    ]
    state: dict[str, Tensor] = {}
    outputs, mask_BT = {}, torch.ones(hidden_LBTD.shape[1:3], dtype=torch.bool)
    for depth, hidden_BTD in enumerate(hidden_LBTD, start=1):
        outputs[depth] = model.exits[str(depth)](hidden_BTD, mask_BT, state)
        knobs = {"threshold": torch.tensor(1.0)}
        state = model.policy.decide(outputs[depth], state, knobs, depth).state
    for hook in hooks:
        hook.remove()
    return outputs, given


def hidden(rows: int = 5) -> Tensor:
    return torch.randn(N, rows, 4, WIDTH, generator=torch.Generator().manual_seed(8))


# What the meta classifier reads


def test_of_a_class_it_reads_one_hot_features_confidence_margin_history_and_progress() -> None:
    made = toy_model("cats", n_layers=N, width=WIDTH, task=CLASSES, seed=1)
    for depth in range(1, N):
        head(made, depth).temperature.fill_(0.5 + 0.2 * depth)
    hidden_LBTD = hidden()
    outputs, given = play(made, hidden_LBTD)
    p = {depth: outputs[depth]["logits"].softmax(-1) for depth in range(1, N)}
    for depth in range(1, N):
        assert given[depth].shape == (5, C + NARROW + 2 + (N - 2))
        for row in range(5):
            chosen = int(p[depth][row].argmax())
            sure, second = sorted(p[depth][row].tolist(), reverse=True)[:2]
            narrow = torch.tanh(head(made, depth).narrow(hidden_LBTD[depth - 1, row, 0])).tolist()
            # Heads 2 to l - 1, most recent first, at the class that is predicted now.
            past = [p[earlier][row, chosen].item() for earlier in range(depth - 1, 1, -1)]
            past += [0.0] * (N - 3 - len(past))
            one_hot = [float(c == chosen) for c in range(C)]
            expected = [*one_hot, *narrow, sure, sure - second, *past, (depth - 1) / (N - 1)]
            torch.testing.assert_close(given[depth][row], torch.tensor(expected))


def test_of_a_value_it_reads_features_earlier_values_and_progress() -> None:
    made = toy_model("cats", n_layers=N, width=WIDTH, task=NUMBER, seed=1)
    hidden_LBTD = hidden()
    outputs, given = play(made, hidden_LBTD)
    for depth in range(1, N):
        assert given[depth].shape == (5, NARROW + N - 2)
        for row in range(5):
            narrow = torch.tanh(head(made, depth).narrow(hidden_LBTD[depth - 1, row, 0])).tolist()
            past = [
                outputs[earlier]["logits"][row, 0].item() for earlier in range(depth - 2, 0, -1)
            ]
            past += [0.0] * (N - 3 - len(past))
            expected = [*narrow, *past, (depth - 1) / (N - 1)]
            torch.testing.assert_close(given[depth][row], torch.tensor(expected))


def test_the_score_is_the_second_probability_of_a_small_net(model: MultiExitModel) -> None:
    outputs, given = play(model, hidden())
    for depth in range(1, N):
        first, _, second = head(model, depth).meta
        with torch.no_grad():
            logits_B2 = second(torch.tanh(first(given[depth])))
        expected = (logits_B2[:, 1] - logits_B2[:, 0]).sigmoid()
        torch.testing.assert_close(outputs[depth]["score"], expected)
        assert second.get_parameter("weight").shape == (2, 32)


def test_logits_are_divided_by_the_exits_temperature() -> None:
    made = toy_model("cats", n_layers=N, width=WIDTH, seed=1)
    before, _ = play(made, hidden())
    head(made, 2).temperature.fill_(4.0)
    after, _ = play(made, hidden())
    torch.testing.assert_close(after[2]["logits"], before[2]["logits"] / 4)
    assert not torch.allclose(after[2]["score"], before[2]["score"])
    assert not torch.allclose(after[3]["score"], before[3]["score"]), "by way of the history"
    torch.testing.assert_close(after[1], before[1])


def test_a_meta_classifier_may_be_shared_by_all_exits() -> None:
    each = toy_model("cats", n_layers=N)
    assert len({id(head(each, depth).meta) for depth in range(1, N)}) == N - 1
    shared = toy_model("cats", n_layers=N, settings={"meta": "shared"})
    assert len({id(head(shared, depth).meta) for depth in range(1, N)}) == 1
    with pytest.raises(ValueError, match="must be each or shared"):
        toy_model("cats", n_layers=N, settings={"meta": "some"})


# The rule


def decide(score: float, threshold: float, kind: str = "classification") -> tuple[bool, float]:
    policy = ConsistencyPolicy((1, 2, 3), 2 if kind == "classification" else 0, 0.5)
    logits_BC = torch.tensor([[1.0, 2.0]] if kind == "classification" else [[1.0]])
    outputs = {"logits": logits_BC, "score": torch.tensor([score])}
    decision = policy.decide(outputs, {}, {"threshold": torch.tensor(threshold)}, 1)
    assert torch.equal(decision.answer, logits_BC)
    return bool(decision.leave_B.item()), decision.confidence_B.item()


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_row_leaves_where_its_score_is_above_lambda_and_not_at_it(kind: str) -> None:
    assert decide(0.75, 0.5, kind) == (True, 0.75)
    assert decide(0.5, 0.5, kind) == (False, 0.5)
    assert decide(1.0, 1.0, kind) == (False, 1.0), "1.0 stands for infinity"
    assert decide(0.0, -0.01, kind) == (True, 0.0)
    assert decide(math.nan, -0.01, kind) == (False, 0.0)


def test_an_answer_agrees_with_the_full_models_class_or_is_near_its_value() -> None:
    classes = ConsistencyPolicy((1, 2), 3, 0.5)
    full = torch.tensor([[0.0, 1.0, 0.0]]).expand(3, -1)
    answer = torch.tensor([[0.0, 5.0, 4.0], [2.0, 1.0, 0.0], [0.0, 5.0, math.nan]])
    assert classes.agrees(answer, full).tolist() == [True, False, False]
    values = ConsistencyPolicy((1, 2), 0, 0.5)
    near = torch.tensor([[1.5], [0.5], [1.51], [math.nan]])
    assert values.agrees(near, torch.ones(4, 1)).tolist() == [True, True, False, False]


# What is carried


def test_probabilities_of_exits_two_and_up_are_carried_or_all_values() -> None:
    classes = ConsistencyPolicy(tuple(range(1, N + 1)), C, 0.5)
    assert classes.state_fields(1) == {}
    assert classes.state_fields(2) == {"history": StateField("float32", (1, C))}
    assert classes.state_fields(5) == {"history": StateField("float32", (4, C))}
    values = ConsistencyPolicy(tuple(range(1, N + 1)), 0, 0.5)
    assert values.state_fields(1) == {"history": StateField("float32", (1,))}
    assert values.state_fields(5) == {"history": StateField("float32", (5,))}
    assert classes.state_fields(N) == values.state_fields(N) == {}


def test_the_history_sent_across_any_split_gives_the_same_scores(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    layers = TorchLayers(model)
    cuts = {depth: model.cut(depth) for depth in range(N)}
    # At thresholds low and high: a row's confidence is its score at the exit where it leaves.
    for threshold in (*mixed_knobs(model)["threshold"][:1], -0.01, 1.0):
        knobs = {"threshold": (threshold,) * N}
        expected = whole(layers, inputs, knobs)
        for k in range(N + 1):
            assert cut_at(k, layers, inputs, knobs, cuts).same_as(expected), f"split point {k}"


@pytest.mark.slow
def test_graphs_of_six_exits_give_the_same_scores(
    model: MultiExitModel, inputs: Activations[NumpyArray], tmp_path: Path
) -> None:
    about = About("toy", 64, 1, operating_points={"fp32": mixed_knobs(model)})
    bundle = add_graphs(save_model(tmp_path, model, toy_tokenizer(), about), precisions=["fp32"])
    loaded = load_model(bundle)
    assert head(loaded, 3).temperature.item() == head(model, 3).temperature.item() != 1.0
    graphs, knobs = OnnxLayers(bundle), mixed_knobs(model)
    got = Outcome.of(run(graphs, inputs, N, knobs).left)
    close(got, whole(TorchLayers(loaded), inputs, knobs))
    assert len(set(got.depth_B.tolist())) > 2


def test_a_shared_meta_classifier_is_stored_once_and_counts_for_every_cut(tmp_path: Path) -> None:
    made = toy_model("cats", n_layers=N, settings={"meta": "shared"}, seed=2)
    bundle = save_model(tmp_path / "a", made, toy_tokenizer(), About("toy", 64, 1))
    assert [n for n in bundle.tensors if ".meta.0.weight" in n] == ["exits.1.meta.0.weight"]
    weight = head(made, 1).get_parameter("meta.0.weight")
    assert torch.equal(head(load_model(bundle), 4).get_parameter("meta.0.weight"), weight)
    with torch.no_grad():
        weight.mul_(2.0)
    other = save_model(tmp_path / "b", made, toy_tokenizer(), About("toy", 64, 1))
    assert all(bundle.digest(d) != other.digest(d) for d in range(N - 1))


@pytest.mark.parametrize("exits", [(6,), (3, 6), (2, 4, 6), (1, 2, 5, 6)])
@pytest.mark.parametrize("task", [CLASSES, NUMBER], ids=lambda task: task.kind)
def test_exits_may_stand_after_some_layers_only(
    exits: tuple[int, ...], task: TaskSpec, inputs: Activations[NumpyArray]
) -> None:
    made = toy_model("cats", n_layers=N, exits=exits, task=task, seed=3)
    layers, knobs = TorchLayers(made), {"threshold": (0.5,) * N}
    expected = whole(layers, inputs, knobs)
    assert set(expected.depth_B.tolist()) <= set(exits)
    cuts = {depth: made.cut(depth) for depth in range(N)}
    for k in range(N + 1):
        assert cut_at(k, layers, inputs, knobs, cuts).same_as(expected)


def test_the_last_exit_is_the_full_model(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    layers = TorchLayers(model)
    rest = run(layers, to_torch(inputs), N - 1, {"threshold": (1.0,) * N}).rest
    assert rest is not None
    with torch.no_grad():
        mask_BT = (
            torch.arange(rest.hidden_BTD.shape[1]) < torch.from_numpy(inputs.lengths_B)[:, None]
        )
        last = model.backbone.run_layers(rest.hidden_BTD, mask_BT, N - 1, N)
        full = model.exits[str(N)](last, mask_BT, {})["logits"]
    got = whole(layers, inputs, {"threshold": (1.0,) * N})
    np.testing.assert_array_equal(got.answers, full.numpy())
    assert (got.confidence_B == 1.0).all()
