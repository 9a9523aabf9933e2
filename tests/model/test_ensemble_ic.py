"""Ensemble internal classifiers against the paper's sheet, and on votes counted by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from law import Outcome, cut_at, whole
from subjects import close, inputs
from toy_models import LABELS, mixed_knobs, toy_model, toy_tokenizer

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import Knobs, run
from offramp_common.spec import StateField, never_exit
from offramp_edge.runtime import OnnxLayers
from offramp_model.export import add_graphs
from offramp_model.methods.ensemble_ic import VotePolicy
from offramp_model.methods.pabee import PatiencePolicy
from offramp_model.split_model import MultiExitModel, TorchLayers
from offramp_model.store import About, save_model

N, C = 6, len(LABELS)
VARIANTS: list[dict[str, Any]] = [{}, {"lambda": 0.5}, {"votes": "soft"}]


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return toy_model("ensemble_ic", n_layers=N, seed=1)


@pytest.fixture(scope="module")
def batch() -> Activations[NumpyArray]:
    return inputs(64)


def at(tau: float) -> Knobs:
    return {"tau": (tau,) * N}


def play(
    looks: Sequence[int | Sequence[float]], tau: float, exponent: float = 0.0, soft: bool = False
) -> tuple[int, int]:
    """(exit, answer), both of one sample that shows these classes (of 4), or logits; the last lets it go."""
    policy = VotePolicy(4, tuple(range(1, len(looks) + 1)), exponent, soft)
    state = policy.start(torch.ones(1, 1, dtype=torch.bool))
    for depth, look in enumerate(looks, start=1):
        logits = [4.0 * (c == look) for c in range(4)] if isinstance(look, int) else list(look)
        decision = policy.decide(
            {"logits": torch.tensor([logits])}, state, {"tau": torch.tensor(tau)}, depth
        )
        state = decision.state
        if decision.leave_B.item():
            break
    return depth, int(decision.answer.argmax())


def patience(looks: Sequence[int], t: int) -> int:
    """The exit at which PABEE lets the same sample go."""
    policy = PatiencePolicy(len(looks), regression=False)
    state = policy.start(torch.ones(1, 1, dtype=torch.bool))
    for depth, look in enumerate(looks, start=1):
        logits_BC = torch.nn.functional.one_hot(torch.tensor([look]), 4).float()
        decision = policy.decide({"logits": logits_BC}, state, {"patience": torch.tensor(t)}, depth)
        state = decision.state
        if decision.leave_B.item():
            break
    return depth


# The sheet's "How to test"


def test_where_no_class_comes_back_votes_are_pabees_patience() -> None:
    unbroken = 0
    for looks in itertools.product(range(3), repeat=5):
        runs = [c for c, _ in itertools.groupby(looks)]
        if len(runs) == len(set(runs)):
            unbroken += 1
            for t in (1, 2, 3):
                assert play(looks, tau=t + 1)[0] == patience(looks, t), (looks, t)
    assert unbroken > 50


@torch.inference_mode()
def test_at_never_the_majority_of_all_exits_answers_and_not_the_last(
    model: MultiExitModel, batch: Activations[NumpyArray]
) -> None:
    got = whole(TorchLayers(model), batch, never_exit(model.knobs, N))
    assert (got.depth_B == N).all()
    mask_BT = torch.from_numpy(mask_of(batch.lengths_B))
    outputs = model(torch.from_numpy(batch.hidden_BTD), mask_BT)
    cast_BL = torch.stack([o["logits"].argmax(-1) for o in outputs.values()], dim=1)
    votes_BC = torch.nn.functional.one_hot(cast_BL, C).sum(1)
    most_B = votes_BC.amax(1)
    answer_B = torch.from_numpy(got.answers).argmax(-1)
    assert (votes_BC.gather(1, answer_B[:, None])[:, 0] == most_B).all(), "a class with most votes"
    differs_B = answer_B != cast_BL[:, -1]
    assert differs_B.any(), "the last classifier alone says otherwise of some"
    assert not differs_B.all()


@pytest.mark.parametrize("tau", [1.0, 1.5, 2.0, 2.3, 3.0, 5.0])
def test_where_all_agree_a_sample_leaves_at_exit_tau_rounded_up(tau: float) -> None:
    assert play([2] * 6, tau) == (math.ceil(tau), 2)


def test_at_tau_one_everyone_leaves_at_the_first_exit(
    model: MultiExitModel, batch: Activations[NumpyArray]
) -> None:
    assert (whole(TorchLayers(model), batch, at(1.0)).depth_B == 1).all()


def test_votes_are_never_slower_than_patience() -> None:
    sooner = 0
    for looks in itertools.product(range(3), repeat=5):
        for t in (1, 2, 3):
            voted, patient = play(looks, tau=t + 1)[0], patience(looks, t)
            assert voted <= patient, (looks, t)
            sooner += voted < patient
    assert sooner > 50, "a break in a row of equal classes must make a difference"


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_votes_that_cross_the_split_keep_results_identical(
    settings: dict[str, Any], batch: Activations[NumpyArray]
) -> None:
    model = toy_model("ensemble_ic", n_layers=N, seed=1, settings=settings)
    layers, knobs = TorchLayers(model), mixed_knobs(model)
    expected = whole(layers, batch, knobs)
    assert len(set(expected.depth_B.tolist())) > 1
    cuts = {depth: model.cut(depth) for depth in range(N)}
    for k in range(N + 1):
        assert cut_at(k, layers, batch, knobs, cuts).same_as(expected), k


# Votes counted by hand, and pitfalls


def test_a_sample_gets_the_class_that_was_voted_for_and_not_the_one_seen_last() -> None:
    assert play([2, 1, 2, 2], tau=3) == (4, 2)
    assert play([1, 1, 2], tau=9) == (3, 1)


def test_of_tied_classes_the_one_more_probable_at_this_exit_wins() -> None:
    sure_of_0, slightly_1, slightly_2 = (4.0, 0, 0, 0), (0, 1.0, 0.9, 0), (0.5, 0.2, 1.0, 0)
    assert play([sure_of_0, slightly_1], tau=9)[1] == 1
    # One vote each for 0, 1 and 2; the last exit finds 2 the most probable, and then 0.
    assert play([sure_of_0, slightly_1, slightly_2], tau=9)[1] == 2
    # Two votes each for 0 and 1; the last exit voted for 2, and finds 0 more probable than 1.
    assert play([0, 1, 1, 0, slightly_2], tau=9)[1] == 0


def test_no_probability_turns_a_majority_around() -> None:
    assert play([0, 0, (0.0, 1e4, 0, 0)], tau=9) == (3, 0)


def test_the_answers_softmax_is_the_share_of_votes_but_for_half_a_vote() -> None:
    policy = VotePolicy(2, (1, 2, 3), 0.0, soft=False)
    state = {"votes": torch.tensor([[1, 1]], dtype=torch.uint8)}
    logits_BC = torch.tensor([[math.log(3.0), 0.0]])  # p = 0.75, 0.25
    decision = policy.decide({"logits": logits_BC}, state, {"tau": torch.tensor(9.0)}, 3)
    expected = torch.tensor([[2.375 / 3.5, 1.125 / 3.5]])
    torch.testing.assert_close(decision.answer.softmax(-1), expected)
    assert decision.state["votes"].tolist() == [[2, 1]]
    assert decision.confidence_B.tolist() == [pytest.approx(2 / 3)]


def test_with_lambda_votes_are_divided_by_a_power_of_the_depth() -> None:
    # V of equal votes: 1, 2 / 2^.5 = 1.41, 3 / 3^.5 = 1.73, 2. One vote against: 1, .71, 1.15, 1.5.
    assert play([1, 1, 1, 1], tau=1.0, exponent=0.5)[0] == 1
    assert play([1, 1, 1, 1], tau=1.4, exponent=0.5)[0] == 2
    assert play([1, 1, 1, 1], tau=1.5, exponent=0.5)[0] == 3
    assert play([1, 2, 1, 1], tau=1.1, exponent=0.5)[0] == 3
    assert play([1, 2, 1, 1, 0], tau=1.45, exponent=0.5)[0] == 4


def test_soft_votes_are_sums_of_probabilities() -> None:
    fair = (0.0, 0.0, -99.0, -99.0)  # a half each
    assert play([fair, fair, fair], tau=1.0, soft=True)[0] == 2
    tilted = (math.log(3.0), 0.0, -99.0, -99.0)  # 3/4 and 1/4
    other = (0.0, 0.1, -99.0, -99.0)
    # Hard votes would be 1 to 2 in favour of class 1; sums are 1.70 to 1.30.
    assert play([tilted, other, other], tau=9.0, soft=True) == (3, 0)
    assert play([tilted, other, other], tau=9.0) == (3, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("soft", [False, True])
def test_a_row_that_is_no_number_votes_for_nothing_and_keeps_its_earlier_votes(
    bad: float, soft: bool
) -> None:
    policy = VotePolicy(2, (1, 2, 3), 0.0, soft)
    state = policy.start(torch.ones(2, 1, dtype=torch.bool))
    sure, broken = torch.tensor([[99.0, 0.0]] * 2), torch.tensor([[bad, 1.0], [99.0, 0.0]])
    knobs = {"tau": torch.tensor(0.0 if soft else 1.0)}
    state = policy.decide({"logits": sure}, state, knobs, 1).state
    decision = policy.decide({"logits": broken}, state, knobs, 2)
    assert decision.leave_B.tolist() == [False, True]
    torch.testing.assert_close(decision.state["votes"].float(), torch.tensor([[1.0, 0], [2.0, 0]]))
    assert decision.answer.argmax(-1).tolist() == [0, 0]
    never = policy.start(torch.ones(2, 1, dtype=torch.bool))
    first = policy.decide({"logits": broken}, never, knobs, 1)
    assert first.answer.isfinite().all()
    assert first.answer[0, 0] == first.answer[0, 1], "nothing is known of it"
    assert first.confidence_B.tolist() == [0.0, pytest.approx(1 / 3)]


def test_counts_do_not_wrap_around_in_their_byte() -> None:
    assert play([1] * 300, tau=256)[0] == 300, "a count that wrapped would be back at 0"
    assert play([1] * 300, tau=255) == (255, 1)


# What is carried, and settings


def test_the_state_is_a_byte_or_a_float_for_each_class() -> None:
    hard, soft = (VotePolicy(7, (1, 2), 0.0, soft) for soft in (False, True))
    assert hard.state_fields(1) == {"votes": StateField("uint8", (7,))}
    assert soft.state_fields(1) == {"votes": StateField("float32", (7,))}
    assert (hard.state_fields(1)["votes"].nbytes, soft.state_fields(1)["votes"].nbytes) == (7, 28)


def test_exits_may_stand_after_some_layers_only(batch: Activations[NumpyArray]) -> None:
    """It is exits that are counted: with three of them nobody has two votes before the second."""
    model = toy_model("ensemble_ic", n_layers=N, exits=[2, 4, N], seed=1)
    assert set(whole(TorchLayers(model), batch, at(2.0)).depth_B.tolist()) == {4, N}


def test_the_range_of_tau_is_what_votes_can_reach() -> None:
    for settings, low, high, whole_numbers in (
        ({}, 1.0, 4.0, True),
        ({"lambda": 0.5}, 1.0, 2.0, False),
        ({"votes": "soft"}, 0.0, 4.0, False),
    ):
        (knob,) = toy_model(
            "ensemble_ic", n_layers=8, exits=[2, 4, 6, 8], settings=settings
        ).knobs  # fmt: skip
        assert (knob.low, knob.high, knob.never, knob.integer) == (low, high, 8.0, whole_numbers)


@pytest.mark.parametrize("settings", [{"lambda": 1.0}, {"lambda": -0.1}, {"votes": "secret"}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} .*: (must be|at least)"):
        toy_model("ensemble_ic", settings=settings)


@pytest.mark.slow
def test_the_graphs_of_soft_votes_with_lambda_decide_as_torch_does(tmp_path: Path) -> None:
    model = toy_model("ensemble_ic", seed=7, settings={"votes": "soft", "lambda": 0.5})
    bundle = save_model(tmp_path, model, toy_tokenizer(), About("toy", 64, 1))
    graphs, knobs = OnnxLayers(add_graphs(bundle, precisions=["fp32"])), mixed_knobs(model)
    got = Outcome.of(run(graphs, inputs(32), model.n_layers, knobs).left)
    close(got, whole(TorchLayers(model), inputs(32), knobs))
