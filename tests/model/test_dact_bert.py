"""DACT-BERT against its sheet, and on mixtures worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import subjects
import torch
from law import Outcome, whole
from torch import Tensor
from toy_models import mixed_knobs, toy_model

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import run
from offramp_common.spec import StateField, TaskSpec
from offramp_model.exits import Decision, State
from offramp_model.methods.dact_bert import MixturePolicy
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch

N = 6
SURE = 1e4  # sigmoid of it is 1 in float32, of its negative 0


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return toy_model("dact_bert", n_layers=N, seed=2)


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(64, below=30)


def logit(share: float) -> float:
    return math.log(share / (1 - share)) if 0 < share < 1 else (SURE if share else -SURE)


def play(
    answers_NBC: Tensor,
    go_on_NB: Tensor,
    *,
    slack: float = 1.0,
    tight: bool = False,
    tolerance: float | None = None,
    exits: Sequence[int] = (),
) -> list[Decision]:
    """The decision at each exit, of rows with these logits (values, with a tolerance)."""
    n, rows, width = answers_NBC.shape
    exits = tuple(exits or range(1, n + 1))
    policy = MixturePolicy(exits, width, tolerance is not None, tight)
    knobs = {"slack": torch.tensor(slack), "tolerance": torch.tensor(tolerance or 0.0)}
    state: State = policy.start(torch.ones(rows, 1, dtype=torch.bool))
    decisions = []
    for depth, answer_BC, go_on_B in zip(exits, answers_NBC, go_on_NB, strict=True):
        outputs = {"logits": answer_BC, "go_on": go_on_B}
        decisions.append(policy.decide(outputs, state, knobs, depth))
        state = decisions[-1].state
    return decisions


def one(
    shares: Sequence[Sequence[float]],
    h: Sequence[float],
    slack: float = 1.0,
    tight: bool = False,
    exits: Sequence[int] = (),
) -> list[Decision]:
    """`play` of one row, from the exits' probabilities and shares h."""
    answers_NBC = torch.log(torch.tensor(shares) + 1e-30).unsqueeze(1)  # a logit is a finite number
    go_on_NB = torch.tensor([[logit(share)] for share in h])
    return play(answers_NBC, go_on_NB, slack=slack, tight=tight, exits=exits)


def left_at(decisions: list[Decision]) -> list[bool]:
    """Whether the one row would leave, at each exit."""
    return [bool(decision.leave_B.item()) for decision in decisions]


def random_rows(rows: int, classes: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(logits_NBC, go_on_NB): from undecided to sure, from those that end soon to those that go on."""
    generator = torch.Generator().manual_seed(seed)
    scale_B1 = torch.rand(rows, 1, generator=generator) * 6
    mean_B = torch.rand(rows, generator=generator) * 6 - 4
    logits_NBC = scale_B1 * torch.randn(n, rows, classes, generator=generator)
    return logits_NBC, mean_B + 2 * torch.randn(n, rows, generator=generator)


# The sheet's "How to test"


@torch.inference_mode()
def test_the_mixture_is_a_probability_and_its_weight_never_grows(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    mask_BT = torch.from_numpy(mask_of(inputs.lengths_B))
    outputs = model(torch.from_numpy(inputs.hidden_BTD), mask_BT)
    state: State = model.policy.start(mask_BT)
    for depth in range(1, N + 1):
        here = {"slack": torch.tensor(1.0)}
        decision = model.policy.decide(outputs[depth], state, here, depth)
        assert (decision.state["a"] >= 0).all()
        # A dozen float32 sums and products of numbers up to 1.
        assert (decision.state["a"].sum(dim=-1) - 1.0).abs().max() < 1e-5
        assert (decision.state["p"] <= state["p"]).all()
        state = decision.state


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("classes", [2, 5])
def test_whenever_the_rule_fires_full_depth_gives_the_same_class(tight: bool, classes: int) -> None:
    decisions = play(*random_rows(1000, classes, 12, seed=classes), tight=tight)
    final_B = decisions[-1].state["a"].argmax(dim=-1)
    fired = 0
    for decision in decisions[:-1]:
        here_B = decision.leave_B
        fired += int(here_B.sum())
        assert torch.equal(decision.state["a"].argmax(dim=-1)[here_B], final_B[here_B])
    assert 1000 < fired < 11 * 1000 - 1000, "the rule must fire often, and often not"


def test_a_share_of_zero_at_the_first_exit_ends_it_there_with_that_exits_answer() -> None:
    decisions = one([[0.4, 0.35, 0.25], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], h=[0.0, 0.5, 0.5])
    assert left_at(decisions)[0]
    for decision in decisions:
        assert torch.allclose(decision.state["a"], torch.tensor([[0.4, 0.35, 0.25]]))


def test_shares_of_one_give_each_exits_own_answer_and_leave_at_the_last() -> None:
    shares = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]
    decisions = one(shares, h=[1.0, 1.0, 1.0])
    assert left_at(decisions)[:2] == [False, False]
    for decision, share in zip(decisions, shares, strict=True):
        assert torch.allclose(decision.state["a"], torch.tensor([share]))


@pytest.mark.parametrize("k", range(1, N))
def test_a_cloud_without_the_mixture_and_its_weight_answers_otherwise(
    model: MultiExitModel, inputs: Activations[NumpyArray], k: int
) -> None:
    """With them it answers as if never cut, to the bit: test_methods_contract."""
    layers, knobs = TorchLayers(model), mixed_knobs(model)
    expected = whole(layers, inputs, knobs)
    first = run(layers, to_torch(inputs), k, knobs)
    assert first.rest is not None, "some rows must be left to test anything"
    start = model.policy.start(torch.from_numpy(mask_of(first.rest.lengths_B)))
    dropped = Outcome.of(run(layers, replace(first.rest, state=start), N, knobs).left)
    apart = np.abs(dropped.answers - expected.answers[first.rest_rows]).max(axis=1)
    assert (apart > 1e-3).mean() > 0.9


# Its pitfalls, and mixtures worked out by hand


def test_a_new_answer_has_the_weight_from_before_its_own_share() -> None:
    # a_2 = 0.5 * (0, 1) + 0.5 * (1, 0), whatever h_2 is.
    decisions = one([[1.0, 0.0], [0.0, 1.0]], h=[0.5, 0.01])
    assert torch.allclose(decisions[1].state["a"], torch.tensor([[0.5, 0.5]]))
    assert decisions[1].state["p"].item() == pytest.approx(0.005)


def test_the_bound_has_p_times_d_and_not_p_to_the_d() -> None:
    # Two exits to come: 0.75 * 0.7^2 = 0.3675 against 0.25 + 0.3 * 2 = 0.85; against 0.25 + 0.3^2 it would
    # leave, and two sure exits of the other class would prove it wrong: 0.525, 0.475, then 0.3675, 0.6325.
    shares = [[0.75, 0.25], [0.0, 1.0], [0.0, 1.0]]
    decisions = one(shares, h=[0.3, 1.0, 1.0])
    assert left_at(decisions)[:2] == [False, False]
    assert torch.allclose(decisions[1].state["a"], torch.tensor([[0.525, 0.475]]))
    assert torch.allclose(decisions[2].state["a"], torch.tensor([[0.3675, 0.6325]]))
    # 0.9 * 0.9^2 = 0.729 >= 0.1 + 0.1 * 2 = 0.3
    assert left_at(one([[0.9, 0.1]] * 3, h=[0.1, 1.0, 1.0]))[0]


def test_d_is_what_is_still_to_come_and_not_a_constant() -> None:
    # At exit 1: 0.8 * 0.8^2 = 0.512 < 0.2 + 0.4. At exit 2: 0.8 * 0.8 = 0.64 >= 0.2 + 0.2.
    assert left_at(one([[0.8, 0.2]] * 3, h=[0.2, 1.0, 1.0]))[:2] == [False, True]


def test_d_counts_exits_where_they_stand_after_some_layers_only() -> None:
    shares, h = [[0.8, 0.2]] * 3, [0.2, 1.0, 1.0]
    got = one(shares, h, exits=(2, 5, 12))
    assert left_at(got) == left_at(one(shares, h))


def test_the_tight_bound_leaves_exactly_when_the_worst_that_may_come_keeps_the_class() -> None:
    # 0.85 * 0.8^2 = 0.544: below 0.15 + 0.2 * 2 = 0.55, above 1 - 0.85 * 0.8^2 = 0.456.
    shares, h = [[0.85, 0.15]] * 3, [0.2, 1.0, 1.0]
    assert not left_at(one(shares, h))[0]
    assert left_at(one(shares, h, tight=True))[0]
    logits_NBC, go_on_NB = random_rows(500, 3, 5, seed=9)
    plain, tight = (play(logits_NBC, go_on_NB, tight=t)[1] for t in (False, True))
    assert (tight.leave_B | ~plain.leave_B).all()
    assert tight.leave_B.sum() > plain.leave_B.sum()
    a_BC, p_B1 = tight.state["a"].double(), tight.state["p"].double().unsqueeze(1)
    rival_BC = torch.nn.functional.one_hot(a_BC.topk(2).indices[:, 1], 3)
    top_B = a_BC.argmax(dim=-1)
    for _ in range(
        3
    ):  # the three exits to come are sure of the second class and give way to nothing
        a_BC = p_B1 * rival_BC + (1 - p_B1) * a_BC
    assert torch.equal(tight.leave_B, a_BC.argmax(dim=-1) == top_B)


def test_less_slack_leaves_earlier_and_none_at_once() -> None:
    # 0.75 * 0.7^(2 g) against 0.25 + 0.6 g: at g = 0.25 0.627 against 0.4, at 0.75 0.44 against 0.7.
    shares, h = [[0.75, 0.25]] * 3, [0.3, 1.0, 1.0]
    assert [left_at(one(shares, h, g))[0] for g in (0.0, 0.25, 0.75, 1.0)] == [
        True,
        True,
        False,
        False,
    ]
    logits_NBC, go_on_NB = random_rows(200, 3, 4, seed=1)
    leaving = [
        sum(int(d.leave_B.sum()) for d in play(logits_NBC, go_on_NB, slack=g)[:-1])
        for g in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    assert leaving == sorted(leaving, reverse=True)
    assert leaving[0] == 3 * 200


@pytest.mark.parametrize("tight", [False, True])
def test_never_holds_even_where_nothing_is_left_to_come(tight: bool) -> None:
    for h in (0.0, 1e-9, 0.5, 1.0):
        assert not any(left_at(one([[1.0, 0.0]] * 3, h=[h] * 3, slack=2.0, tight=tight)))


def test_the_answers_softmax_is_the_mixture() -> None:
    for decision in play(*random_rows(100, 4, 3, seed=4)):
        a_BC = decision.state["a"]
        # 1e-12 is added to each share; the rest is float32's rounding.
        assert torch.allclose(decision.answer.softmax(dim=-1), a_BC, atol=1e-6)
        assert torch.equal(decision.answer.argmax(dim=-1), a_BC.argmax(dim=-1))
        assert decision.answer.isfinite().all()


def test_each_row_has_a_mixture_of_its_own() -> None:
    logits_NBC, go_on_NB = random_rows(8, 3, 4, seed=5)
    together = play(logits_NBC, go_on_NB)
    for row in range(8):
        alone = play(logits_NBC[:, [row]], go_on_NB[:, [row]])
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a.state["a"][0], b.state["a"][row])
            assert a.leave_B[0] == b.leave_B[row]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "go_on"])
def test_a_row_that_was_no_number_once_leaves_at_no_later_exit_either(
    bad: float, where: str
) -> None:
    logits_NBC = torch.tensor([5.0, 0.0]).expand(3, 2, 2).clone()
    go_on_NB = torch.full((3, 2), -SURE)
    if where == "logits":
        logits_NBC[0, 0, 1] = bad
    else:
        go_on_NB[0, 0] = bad
    for slack in (0.0, 1.0):
        decisions = play(logits_NBC, go_on_NB, slack=slack)
        assert [d.leave_B.tolist() for d in decisions[:2]] == [[False, True], [False, True]]
        assert all(d.confidence_B[0] == 0 for d in decisions)
    values = play(logits_NBC[..., 1:], go_on_NB, tolerance=1.01)
    assert not any(d.leave_B[0] for d in values)
    assert all(d.leave_B[1] for d in values)


# Regression: the sheet's rule, as a share of the range


def test_a_value_leaves_when_what_is_to_come_can_move_it_by_less_than_the_tolerance() -> None:
    values_NB1, go_on_NB = torch.full((3, 1, 1), 3.0), torch.tensor([[logit(0.1)]] * 3)
    # p = 0.1, d = 2: 1 - 0.9^2 = 0.19; of a range from 1 to 5 that is 0.76.
    assert not left_at(play(values_NB1, go_on_NB, tolerance=0.75 / 4))[0]
    assert left_at(play(values_NB1, go_on_NB, tolerance=0.77 / 4))[0]


def test_a_value_within_the_range_never_moves_further_than_the_tolerance() -> None:
    generator = torch.Generator().manual_seed(6)
    values_NB1 = torch.rand(6, 500, 1, generator=generator)
    go_on_NB = 2 * torch.randn(6, 500, generator=generator) - 1
    decisions = play(values_NB1, go_on_NB, tolerance=0.05)
    final_B1, fired = decisions[-1].answer, 0
    for decision in decisions[:-1]:
        here_B = decision.leave_B
        fired += int(here_B.sum())
        # Float32 rounding of numbers up to 1.
        assert ((decision.answer - final_B1).abs()[here_B] < 0.05 + 1e-6).all()
    assert fired > 200


def test_a_value_is_the_mean_of_the_exits_by_their_weights() -> None:
    values_NB1 = torch.tensor([1.0, 3.0, 5.0]).reshape(3, 1, 1)
    decisions = play(values_NB1, torch.tensor([[logit(0.5)]] * 3), tolerance=0.1)
    # 1; 0.5 * 3 + 0.5 * 1 = 2; 0.25 * 5 + 0.75 * 2 = 2.75
    assert [d.answer.item() for d in decisions] == pytest.approx([1.0, 2.0, 2.75])


def test_tolerance_zero_never_leaves_even_where_nothing_is_left_to_come() -> None:
    values_NB1, go_on_NB = torch.zeros(3, 1, 1), torch.full((3, 1), -SURE)
    assert not any(left_at(play(values_NB1, go_on_NB, tolerance=0.0)))


# What is carried, and the architecture


def test_the_state_is_the_mixture_and_its_weight() -> None:
    p = StateField("float32")
    classes = MixturePolicy((1, 2, 3), 5, regression=False)
    assert classes.state_fields(2) == {"a": StateField("float32", (5,)), "p": p}
    values = MixturePolicy((1, 2, 3), 1, regression=True)
    assert values.state_fields(2) == {"a": StateField("float32", (1,)), "p": p}


def test_every_layer_has_heads_of_its_own_that_start_by_going_on(model: MultiExitModel) -> None:
    exits = [model.exits[str(depth)] for depth in range(1, N + 1)]
    for name in ("classifier.weight", "go_on.weight"):
        assert len({head.get_parameter(name).data_ptr() for head in exits}) == N
    assert all(head.get_parameter("go_on.bias").item() == 2.0 for head in exits)
    width, classes = model.spec.width, model.spec.task.answer_width
    assert sum(p.numel() for p in exits[0].parameters()) == width * classes + classes + width + 1


def test_confidence_is_the_least_share_that_the_top_class_can_end_with() -> None:
    decisions = one([[0.75, 0.25]] * 3, h=[0.3, 1.0, 1.0])
    assert decisions[0].confidence_B.item() == pytest.approx(0.75 * 0.7**2)
    assert decisions[2].confidence_B.item() == pytest.approx(0.75)


def test_a_bound_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="bound 'loose': must be plain or tight"):
        toy_model("dact_bert", settings={"bound": "loose"})
    task = TaskSpec("regression")
    assert [k.name for k in toy_model("dact_bert", task=task).knobs] == ["tolerance"]
