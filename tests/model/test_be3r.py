"""BE3R against its sheet: routers at a few exits, and what they save."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from law import Outcome, whole
from toy_models import mixed_knobs, toy_model

from offramp_common.activations import Activations, NumpyArray, unpack
from offramp_common.runner import Knobs, run
from offramp_common.spec import never_exit
from offramp_model.methods.be3r import RouterPolicy
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch

EXITS, N = (2, 4, 6), 6


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return toy_model("be3r", n_layers=N, exits=EXITS, seed=2)


def inputs(rows: int, tokens: int = 0) -> Activations[NumpyArray]:
    """Random rows, of as many tokens each, or of different lengths."""
    rng = np.random.default_rng(0)
    lengths_B = np.full(rows, tokens) if tokens else rng.integers(1, 30, rows)
    ids_NF = rng.integers(0, 100, (lengths_B.sum(), 1))
    return Activations(unpack(ids_NF, lengths_B), lengths_B, depth=0)


def leaves(route: list[float], threshold: float) -> list[bool]:
    outputs = {"logits": torch.zeros(len(route), 2), "route": torch.tensor(route)}
    decision = RouterPolicy().decide(outputs, {}, {"threshold": torch.tensor(threshold)}, 1)
    left: list[bool] = decision.leave_B.tolist()
    return left


# The sheet's "How to test" (the chances' sum, and the price of depth: tests/train/test_be3r.py)


def test_a_batch_gives_each_sample_what_it_gets_alone_in_the_batchs_order(
    model: MultiExitModel,
) -> None:
    layers, batch, knobs = TorchLayers(model), inputs(64), mixed_knobs(model)
    together = whole(layers, batch, knobs)
    assert set(together.depth_B.tolist()) == set(EXITS), "rows must leave at each exit"
    for row in range(64):
        alone = whole(layers, batch.take(np.array([row])), knobs)
        assert alone.depth_B[0] == together.depth_B[row]
        # Other batch shapes sum float32 in another order.
        np.testing.assert_allclose(alone.answers[0], together.answers[row], rtol=0, atol=1e-4)


def _half_leaves_first(model: MultiExitModel, batch: Activations[NumpyArray]) -> Knobs:
    """Thresholds at which half of the rows leave at the first exit, and the others at the last."""
    knobs = never_exit(model.knobs, model.n_layers)
    first = model.spec.exits[0]
    acts = to_torch(batch)
    for _ in range(first):
        step = TorchLayers(model).step(acts, knobs)
        acts = step.acts
    assert step.look is not None
    values = list(knobs["threshold"])
    values[first - 1] = float(np.median(step.look.confidence_B))
    return {"threshold": tuple(values)}


@pytest.mark.slow
def test_when_half_of_a_batch_leaves_first_the_others_layers_are_really_saved() -> None:
    first, last = 2, 12
    model = toy_model("be3r", n_layers=last, width=128, exits=[first, last], seed=3)
    layers, batch = TorchLayers(model), inputs(64, tokens=32)
    half, never = _half_leaves_first(model, batch), never_exit(model.knobs, last)
    acts = to_torch(batch)
    depth_B = Outcome.of(run(layers, acts, last, half).left).depth_B
    assert sorted(depth_B.tolist()) == [first] * 32 + [last] * 32
    seconds: dict[str, list[float]] = {"half": [], "full": []}
    for _ in range(7):  # in turn, and the least of each: other work on the machine only adds
        for name, knobs in (("half", half), ("full", never)):
            started = time.perf_counter()
            run(layers, acts, last, knobs)
            seconds[name].append(time.perf_counter() - started)
    saved = 1 - min(seconds["half"]) / min(seconds["full"])
    # Half of the rows skip ten of twelve layers: 0.42. Overhead may take a third of that.
    assert saved > 0.5 * (last - first) / last * (2 / 3)


# The rule, and its pitfalls


def test_a_sample_leaves_where_its_router_reaches_the_threshold_at_equality_too() -> None:
    assert leaves([0.0, -1e-3, 1e-3], threshold=0.5) == [True, False, True]
    # sigmoid(ln 3) = 0.75
    assert leaves([math.log(3) - 1e-3, math.log(3) + 1e-3], threshold=0.75) == [False, True]


def test_never_holds_even_where_a_router_is_certain() -> None:
    assert torch.sigmoid(torch.tensor(100.0)) == 1
    assert leaves([100.0], threshold=1.0) == [True]
    assert leaves([100.0], threshold=2.0) == [False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_router_that_says_no_number_lets_nobody_leave_even_at_threshold_zero(bad: float) -> None:
    assert leaves([bad, -100.0], threshold=0.0) == [False, True]
    outputs = {"logits": torch.tensor([[bad, 0.0]]), "route": torch.tensor([9.0])}
    decision = RouterPolicy().decide(outputs, {}, {"threshold": torch.tensor(0.0)}, 1)
    assert not decision.leave_B.item()
    assert decision.confidence_B.item() == 0


def test_nothing_is_asked_between_the_exits(model: MultiExitModel) -> None:
    assert [depth for depth in range(1, N + 1) if model.head(depth) is not None] == list(EXITS)
    knobs = {"threshold": (0.0, 2.0, 0.0, 2.0, 0.0, 2.0)}  # as if all but the exits said: leave
    assert (whole(TorchLayers(model), inputs(8), knobs).depth_B == N).all()


def test_all_exits_but_the_last_have_a_router_of_their_own(model: MultiExitModel) -> None:
    width, classes = model.spec.width, model.spec.task.answer_width
    expert = width * width + width + width * classes + classes
    router = width * 128 + 128 + 128 + 1
    sizes = [sum(p.numel() for p in model.exits[str(d)].parameters()) for d in EXITS]
    assert sizes == [expert + router, expert + router, expert]
    routers = [model.exits[d].get_parameter("router.0.weight") for d in ("2", "4")]
    assert routers[0] is not routers[1]


def test_nothing_is_carried(model: MultiExitModel) -> None:
    assert all(model.cut(depth).state == {} for depth in range(N))


def test_confidence_is_the_routers_and_one_where_there_is_none() -> None:
    policy, knobs = RouterPolicy(), {"threshold": torch.tensor(2.0)}
    logits_BC = torch.tensor([[1.0, 0.0], [math.nan, 0.0]])
    routed = policy.decide(
        {"logits": logits_BC, "route": torch.tensor([math.log(3), 0.0])}, {}, knobs, 2
    )
    assert routed.confidence_B.tolist() == pytest.approx([0.75, 0.0])
    assert policy.decide({"logits": logits_BC}, {}, knobs, 6).confidence_B.tolist() == [1.0, 0.0]
