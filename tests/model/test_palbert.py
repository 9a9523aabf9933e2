"""PALBERT against its sheet, and on chances worked out by hand."""

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
from toy_models import mixed_knobs, toy_model

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import Knobs, run
from offramp_common.spec import StateField, TaskSpec, never_exit
from offramp_model.exits import Decision, State
from offramp_model.export import capture
from offramp_model.methods.palbert import QExitPolicy
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch

N, WIDTH = 6, 32


@pytest.fixture(scope="module", params=["classification", "regression"])
def model(request: pytest.FixtureRequest) -> MultiExitModel:
    labels = ("a", "b", "c") if request.param == "classification" else ()
    return toy_model("palbert", n_layers=N, task=TaskSpec(request.param, labels), seed=2)


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(64, below=30)


def at(q: float) -> Knobs:
    return {"q": (q,) * N}


def outcome(model: MultiExitModel, inputs: Activations[NumpyArray], knobs: Knobs) -> Outcome:
    return whole(TorchLayers(model), inputs, knobs)


def play(stop_NB: Sequence[Sequence[float]], q: float) -> list[Decision]:
    """The decision at each exit, of rows with these logits of lambda."""
    policy, knobs = QExitPolicy(1), {"q": torch.tensor(q)}
    state: State = policy.start(torch.ones(len(stop_NB[0]), 1, dtype=torch.bool))
    decisions = []
    for depth, stop in enumerate(stop_NB, start=1):
        stop_B = torch.tensor(stop)
        nothing = torch.zeros(len(stop), 1)
        outputs = {"logits": nothing, "stop": stop_B, "u": nothing}
        decisions.append(policy.decide(outputs, state, knobs, depth))
        state = decisions[-1].state
    return decisions


def first_exit(chances: Sequence[float], q: float) -> int | None:
    """Where one row with these lambdas leaves; None: at none of them."""
    stop = [[math.log(c / (1 - c))] for c in chances]
    left = [bool(decision.leave_B.item()) for decision in play(stop, q)]
    return left.index(True) + 1 if any(left) else None


# The sheet's "How to test"


def test_the_chance_to_have_stopped_is_one_less_the_product_of_going_on() -> None:
    stop_NB = 3 * torch.randn(12, 200, generator=torch.Generator().manual_seed(0))
    on_NB = (1 - torch.sigmoid(stop_NB.double())).cumprod(dim=0)
    stopped = [d.confidence_B for d in play(stop_NB.tolist(), q=1.0)]
    for decision_B, on_B in zip(stopped, on_NB, strict=True):
        assert (decision_B - (1 - on_B)).abs().max() < 1e-6, "float32, numbers up to 1"
        assert (decision_B <= 1).all()
    steps = [b - a for a, b in itertools.pairwise(stopped)]
    assert all((step_B >= 0).all() for step_B in steps), "a stop's chance is not negative"


def test_a_constant_chance_leaves_at_the_smallest_exit_that_is_above_q() -> None:
    assert first_exit([0.1] * 12, q=0.5) == 7
    for chance, q in itertools.product((0.05, 0.2, 0.3, 0.6), (0.1, 0.45, 0.7, 0.9)):
        expected = next(n for n in range(1, 99) if 1 - (1 - chance) ** n > q)
        assert first_exit([chance] * 60, q) == expected


def test_q_zero_leaves_at_the_first_exit_and_one_at_the_last_and_deeper_between(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    depths = [outcome(model, inputs, at(q)).depth_B for q in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert (depths[0] == 1).all()
    assert (depths[-1] == N).all()
    for less, more in itertools.pairwise(depths):
        assert (more >= less).all()
    assert len({float(depth_B.mean()) for depth_B in depths}) > 3, "q must make a difference"


def test_two_runs_are_the_same_to_the_bit(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    knobs = mixed_knobs(model)
    assert outcome(model, inputs, knobs).same_as(outcome(model, inputs, knobs))


@pytest.mark.parametrize("lost", ["s", "u"])
def test_both_parts_of_the_state_are_needed_after_a_cut(
    inputs: Activations[NumpyArray], lost: str
) -> None:
    """With them rows leave as if never cut, to the bit: test_methods_contract."""
    model = toy_model("palbert", n_layers=N, seed=2)
    layers = TorchLayers(model)
    first = run(layers, to_torch(inputs), 2, never_exit(model.knobs, N))
    assert first.rest is not None
    start = model.policy.start(torch.from_numpy(mask_of(first.rest.lengths_B)))
    broken = replace(first.rest, state={**first.rest.state, lost: start[lost]})
    stops = []
    for acts in (first.rest, broken):
        look = layers.step(acts, never_exit(model.knobs, N)).look
        assert look is not None
        stops.append(look.confidence_B)
    assert (np.abs(stops[0] - stops[1]) > 1e-6).mean() > 0.5


# Its pitfalls, and what it is made of


def test_the_threshold_is_strict() -> None:
    # sigmoid(0) is exactly 0.5, and so is 1 - 0.5.
    assert first_exit([0.5, 0.5], q=0.5) == 2
    assert first_exit([0.5, 0.5], q=0.4999) == 1


def test_q_one_never_leaves_even_where_a_stop_is_certain() -> None:
    assert not any(d.leave_B.item() for d in play([[1e4]] * 4, q=1.0))
    assert play([[1e4]], q=0.9999)[0].leave_B.item()


def test_each_row_has_chances_of_its_own() -> None:
    # Chances 0.5 and 0.12: at q = 0.7 the first leaves at exit 2, the second at none of three.
    going_on = 1 / (1 + math.exp(-2.0))
    decisions = play([[0.0, -2.0]] * 3, q=0.7)
    assert [d.leave_B.tolist() for d in decisions] == [[False, False], [True, False], [True, False]]
    assert decisions[2].state["s"].tolist() == pytest.approx([0.125, going_on**3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_was_no_number_once_leaves_at_no_later_exit_either(bad: float) -> None:
    decisions = play([[bad, 3.0], [3.0, 3.0], [3.0, 3.0]], q=0.0)
    assert [d.leave_B.tolist() for d in decisions] == [[False, True]] * 3
    assert all(d.confidence_B[0] == 0 for d in decisions)


@torch.inference_mode()
def test_the_lambda_head_reads_this_exits_vector_and_then_the_one_before(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    mask_BT = torch.from_numpy(mask_of(inputs.lengths_B))
    outputs = model(torch.from_numpy(inputs.hidden_BTD), mask_BT)
    stop = model.exits["1"].get_submodule("stop")
    before_BD = torch.zeros(64, WIDTH)
    for depth in range(1, N + 1):
        u_BD = outputs[depth]["u"]
        expected = stop(torch.cat([u_BD, before_BD], dim=-1))[:, 0]
        assert torch.equal(outputs[depth]["stop"], expected)
        other = stop(torch.cat([before_BD, u_BD], dim=-1))[:, 0]
        assert not torch.allclose(outputs[depth]["stop"], other)
        before_BD = u_BD


@torch.inference_mode()
def test_the_vector_that_crosses_is_the_one_pooled_from_the_hidden_state_at_the_cut(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    rest = run(TorchLayers(model), to_torch(inputs), 3, never_exit(model.knobs, N)).rest
    assert rest is not None
    pooler = model.exits["3"].get_submodule("pooler")
    again = torch.tanh(pooler(rest.hidden_BTD[:, 0]))
    assert torch.equal(rest.state["u"], again)


def test_all_exits_are_one_head_with_three_blocks_of_twice_the_width(model: MultiExitModel) -> None:
    assert len({id(head) for head in model.exits.values()}) == 1
    d, c = WIDTH, model.spec.task.answer_width
    both = 2 * d
    expected = d * d + d + d * c + c + 3 * (both * both + both) + both + 1
    assert sum(p.numel() for p in model.exits.parameters()) == expected


def test_exits_may_stand_after_some_layers_only(inputs: Activations[NumpyArray]) -> None:
    """The vector before the first exit is 0; before the next it is the first exit's."""
    model = toy_model("palbert", n_layers=N, exits=[2, 5, N], seed=2)
    assert model.cut(1).state == {}
    assert model.cut(3).state == model.cut(2).state == model.policy.state_fields(2)
    assert set(outcome(model, inputs, mixed_knobs(model)).depth_B.tolist()) <= {2, 5, N}


def test_the_state_is_a_float_and_a_vector() -> None:
    fields = {"s": StateField("float32"), "u": StateField("float32", (WIDTH,))}
    assert QExitPolicy(WIDTH).state_fields(2) == fields


@pytest.mark.slow
def test_a_devices_graph_puts_the_vector_out_once() -> None:
    assert capture(toy_model("palbert", n_layers=2), 0).same["out.u"] == "state.u"
