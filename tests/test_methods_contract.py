"""Every method in the table through one contract: a new one is held to it from its first day.

Heads are fed hidden states, never logits made up here: what a branch puts out is the method's own.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from law import Outcome, cut_at, whole
from sheet_bytes import STATE_BYTES
from subjects import BATCHES, SUBJECTS, TOLERANCE, WIDTH, N, Subject, close, inputs
from torch import Tensor
from toy_models import eager, mixed_knobs

import offramp_model.methods
from offramp_common.activations import mask_of
from offramp_common.frames import encode_frame
from offramp_common.runner import Knobs, run
from offramp_common.spec import never_exit
from offramp_model.exits import State, check_knobs
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel, TorchLayers, to_numpy, to_torch


@pytest.fixture(params=SUBJECTS, ids="-".join)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(*request.param)


# The table


def test_each_file_in_methods_is_in_the_table() -> None:
    folder = Path(offramp_model.methods.__file__).parent
    files = {module.name for module in pkgutil.iter_modules([str(folder)])} - {"method"}
    listed = {
        importlib.import_module(f"offramp_model.methods.{name}").METHOD.name for name in files
    }
    assert listed == set(METHODS)
    assert files == set(METHODS), "a method's file has the method's name"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_methods_file_names_its_paper_and_how_it_differs(name: str) -> None:
    method = METHODS[name]
    text = importlib.import_module(f"offramp_model.methods.{name}").__doc__ or ""
    flat = " ".join(text.split())
    assert method.paper.title in flat
    assert method.paper.venue in flat
    assert method.paper.link in flat
    assert method.paper.authors in flat
    assert "The rule:" in flat
    assert "Differs from the paper:" in flat
    for sentence in (method.rule, method.use, method.avoid, method.reported):
        assert sentence.endswith(".")
    assert json.loads(json.dumps(dict(method.settings))) == dict(method.settings)


def test_the_knobs_can_be_checked_and_never_is_one_of_their_values(subject: Subject) -> None:
    model = subject.model()
    assert len({knob.name for knob in model.knobs}) == len(model.knobs) > 0
    for knob in model.knobs:
        assert knob.low < knob.high
        assert knob.meaning
    for point in (never_exit(model.knobs, N), eager(model), mixed_knobs(model)):
        check_knobs(point, model.knobs, N)
        short = {name: values[1:] for name, values in point.items()}
        with pytest.raises(ValueError, match=f"{N - 1} values for {N} layers"):
            check_knobs(short, model.knobs, N)
    with pytest.raises(ValueError, match="values must lie in"):
        check_knobs({k.name: (k.high * 2 + 1,) * N for k in model.knobs}, model.knobs, N)
    with pytest.raises(ValueError, match="this method has"):
        check_knobs({"nonsense": (0.0,) * N}, model.knobs, N)


# Shapes and state


@pytest.mark.parametrize("rows", BATCHES)
def test_every_look_has_a_row_for_each_sample_and_the_state_that_is_declared(
    subject: Subject, rows: int
) -> None:
    model = subject.model()
    layers, acts = TorchLayers(model), to_torch(inputs(rows))
    for depth in range(1, N + 1):
        step = layers.step(acts, mixed_knobs(model))
        acts, look = step.acts, step.look
        assert look is not None
        assert (look.leave_B.dtype, look.leave_B.shape) == (np.dtype(bool), (rows,))
        assert (look.confidence_B.dtype, look.confidence_B.shape) == (np.dtype(np.float32), (rows,))
        assert ((look.confidence_B >= 0) & (look.confidence_B <= 1)).all()
        assert look.answer.shape == (rows, model.spec.task.answer_width)
        assert look.answer.dtype == torch.float32
        assert all(value.shape[0] == rows for value in look.outputs.values())
        declared = model.policy.state_fields(depth)
        assert model.cut(depth).state == declared
        given = to_numpy(acts)
        for name, entry in declared.items():
            value = (given.token_state if entry.per_token else given.state)[name]
            axes = given.hidden_BTD.shape[: 2 if entry.per_token else 1]
            assert (str(value.dtype), value.shape) == (entry.dtype, (*axes, *entry.shape)), name
        assert {*given.state, *given.token_state} == set(declared)


@pytest.mark.parametrize("rows", BATCHES)
def test_the_state_takes_on_the_wire_what_the_sheet_says(subject: Subject, rows: int) -> None:
    model = subject.model()
    for depth in range(1, N):
        rest = run(
            TorchLayers(model), to_torch(inputs(rows)), depth, never_exit(model.knobs, N)
        ).rest
        assert rest is not None
        state = msgpack.unpackb(encode_frame(to_numpy(rest), model.cut(depth), "fp32"))[5]
        nbytes = sum(len(value) for value in state.values())
        assert nbytes == rows * STATE_BYTES[subject.method, subject.kind](depth)


@torch.inference_mode()
def test_training_sees_the_outputs_that_the_runner_sees(subject: Subject) -> None:
    model, batch = subject.model(), inputs(8)
    layers, acts = TorchLayers(model), to_torch(batch)
    seen = model(acts.hidden_BTD, torch.from_numpy(mask_of(batch.lengths_B)))
    assert sorted(seen) == list(range(1, N + 1))
    for depth, outputs in seen.items():
        step = layers.step(acts, never_exit(model.knobs, N))
        acts, look = step.acts, step.look
        assert look is not None
        assert set(outputs) == set(look.outputs)
        for name, value in outputs.items():
            assert torch.equal(value, look.outputs[name]), (depth, name)


# Who leaves


@pytest.mark.parametrize("rows", BATCHES)
def test_at_the_never_point_all_rows_run_to_full_depth(subject: Subject, rows: int) -> None:
    for seed in range(3):
        model = subject.model(seed)
        got = whole(TorchLayers(model), inputs(rows), never_exit(model.knobs, N))
        assert (got.depth_B == N).all()


def play(
    model: MultiExitModel, hidden_LBTD: Tensor, knobs: Knobs
) -> tuple[list[tuple[np.ndarray, Tensor, np.ndarray]], dict[str, Tensor]]:
    """(leave_B, answer, confidence_B) at each exit for these hidden states, and the last state."""
    mask_BT = torch.ones(hidden_LBTD.shape[1:3], dtype=torch.bool)
    state: State = {}
    looks = []
    for depth, hidden_BTD in enumerate(hidden_LBTD, start=1):
        head = model.head(depth)
        assert head is not None
        here = {name: torch.tensor(values[depth - 1]) for name, values in knobs.items()}
        decision, _ = head(hidden_BTD, mask_BT, state, here)
        state = decision.state
        looks.append((decision.leave_B.numpy(), decision.answer, decision.confidence_B.numpy()))
    return looks, dict(state)


def hidden(rows: int, seed: int = 0, tokens: int = 6) -> Tensor:
    """hidden_LBTD for all exits, no layer run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, rows, tokens, WIDTH, generator=generator)


@torch.no_grad()
def alike_heads(model: MultiExitModel) -> None:
    """Every head gets the first's weights, where they have the same shape."""
    first = {**dict(model.exits["1"].named_parameters()), **dict(model.exits["1"].named_buffers())}
    for depth in range(2, N + 1):
        head = model.exits[str(depth)]
        for name, tensor in (*head.named_parameters(), *head.named_buffers()):
            if name in first and first[name].shape == tensor.shape:
                tensor.copy_(first[name])


@pytest.mark.parametrize("rows", BATCHES)
@torch.inference_mode()
def test_at_the_eager_point_rows_that_look_the_same_at_every_exit_all_leave_early(
    subject: Subject, rows: int
) -> None:
    model = subject.model()
    alike_heads(model)
    looks, _ = play(model, hidden(rows)[:1].expand(N, -1, -1, -1), eager(model))
    assert np.logical_or.reduce([leave_B for leave_B, _, _ in looks[:-1]]).all()


@torch.inference_mode()
def test_a_decision_about_some_rows_is_the_decision_about_all_of_them_taken_apart(
    subject: Subject,
) -> None:
    """Rows know nothing of each other: filtered, reversed and doubled rows decide the same."""
    model = subject.model()
    policy, hidden_LBTD = model.policy, hidden(8)
    mask_BT = torch.ones(hidden_LBTD.shape[1:3], dtype=torch.bool)
    for rows in ([0, 3, 7], list(range(7, -1, -1)), [2, 2, 5], [4]):
        full: State = policy.start(mask_BT)
        some: State = policy.start(mask_BT[rows])
        for depth in range(1, N + 1):
            outputs = model.exits[str(depth)](hidden_LBTD[depth - 1], mask_BT, full)
            knobs = {k: torch.tensor(v[depth - 1]) for k, v in mixed_knobs(model).items()}
            of_all = policy.decide(outputs, full, knobs, depth)
            taken = {name: value[rows] for name, value in outputs.items()}
            of_some = policy.decide(taken, some, knobs, depth)
            assert torch.equal(of_some.leave_B, of_all.leave_B[rows])
            assert torch.equal(of_some.answer, of_all.answer[rows])
            assert torch.equal(of_some.confidence_B, of_all.confidence_B[rows])
            assert all(torch.equal(of_some.state[n], v[rows]) for n, v in of_all.state.items())
            full, some = of_all.state, of_some.state


@pytest.mark.parametrize("rows", BATCHES)
def test_a_batch_gives_each_row_what_it_gets_alone(subject: Subject, rows: int) -> None:
    model = subject.model()
    layers, batch, knobs = TorchLayers(model), inputs(rows), mixed_knobs(model)
    alone = [whole(layers, batch.take(np.array([row])), knobs) for row in range(rows)]
    together = Outcome(
        np.concatenate([one.answers for one in alone]),
        np.concatenate([one.depth_B for one in alone]),
        np.concatenate([one.confidence_B for one in alone]),
    )
    close(whole(layers, batch, knobs), together)


@pytest.mark.parametrize("rows", BATCHES)
def test_the_law_holds_at_every_split_point(subject: Subject, rows: int) -> None:
    model = subject.model()
    layers, batch = TorchLayers(model), inputs(rows)
    cuts = {depth: model.cut(depth) for depth in range(N)}
    for knobs in (mixed_knobs(model), eager(model), never_exit(model.knobs, N)):
        expected = whole(layers, batch, knobs)
        for k in range(N + 1):
            assert cut_at(k, layers, batch, knobs, cuts).same_as(expected), f"split point {k}"


def test_the_operating_point_of_these_tests_lets_rows_leave_at_different_depths(
    subject: Subject,
) -> None:
    """Guards the tests above: `mixed_knobs` must find a point for a new method."""
    model = subject.model()
    got = whole(TorchLayers(model), inputs(64), mixed_knobs(model))
    if model.method.online:  # one exit for all rows, whatever they look like
        assert set(got.depth_B.tolist()) == {2}
        return
    assert 6 <= (got.depth_B < N).sum() <= 58, "some rows must leave early, and some must not"


# Hidden states and heads that are out of the ordinary


def saturated(model: MultiExitModel) -> None:
    scale_heads(model, 1e4)


def overflowing(model: MultiExitModel) -> None:
    scale_heads(model, 1e37)


def tied(model: MultiExitModel) -> None:
    scale_heads(model, 0.0)


@torch.no_grad()
def scale_heads(model: MultiExitModel, factor: float) -> None:
    """Multiplies the parameters of every head, shared ones once."""
    for parameter in model.exits.parameters():
        parameter.mul_(factor)


HEADS: list[Callable[[MultiExitModel], None]] = [saturated, overflowing, tied]


@pytest.mark.parametrize("change", HEADS)
def test_saturated_overflowing_and_tied_heads_obey_the_law_and_the_never_point(
    subject: Subject, change: Callable[[MultiExitModel], None]
) -> None:
    model = subject.model()
    change(model)
    layers, batch = TorchLayers(model), inputs(8)
    cuts = {depth: model.cut(depth) for depth in range(N)}
    for knobs in (mixed_knobs(model), eager(model)):
        expected = whole(layers, batch, knobs)
        assert ((expected.confidence_B >= 0) & (expected.confidence_B <= 1)).all()
        for k in range(N + 1):
            assert cut_at(k, layers, batch, knobs, cuts).same_as(expected)
    assert (whole(layers, batch, never_exit(model.knobs, N)).depth_B == N).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_number_never_leaves_early_and_harms_no_other(
    subject: Subject, bad: float
) -> None:
    model = subject.model()
    layers = TorchLayers(model)
    start = run(layers, to_torch(inputs(8)), 1, never_exit(model.knobs, N)).rest
    assert start is not None
    broken = start.hidden_BTD.clone()
    broken[3, : start.lengths_B[3]] = bad
    for knobs in (mixed_knobs(model), eager(model)):
        healthy = Outcome.of(run(layers, start, N, knobs).left)
        got = Outcome.of(run(layers, replace(start, hidden_BTD=broken), N, knobs).left)
        assert got.depth_B[3] == N
        assert 0 <= got.confidence_B[3] <= 1
        others = np.delete(np.arange(8), 3)
        np.testing.assert_array_equal(got.depth_B[others], healthy.depth_B[others])
        np.testing.assert_allclose(
            got.answers[others], healthy.answers[others], rtol=0, atol=TOLERANCE
        )


def test_what_stands_in_the_padding_changes_nothing(subject: Subject) -> None:
    model = subject.model()
    layers, knobs = TorchLayers(model), mixed_knobs(model)
    start = run(layers, to_torch(inputs(8)), 1, never_exit(model.knobs, N)).rest
    assert start is not None
    mask_BT = torch.from_numpy(mask_of(start.lengths_B))
    other = torch.where(mask_BT[..., None], start.hidden_BTD, 1e3)
    expected = Outcome.of(run(layers, start, N, knobs).left)
    assert Outcome.of(run(layers, replace(start, hidden_BTD=other), N, knobs).left).same_as(
        expected
    )
