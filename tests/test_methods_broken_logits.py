"""Every method in the table on rows whose logits are no numbers: NaN, infinite, or some of both.

Heads with large weights hardly ever give such logits, so they are put where a classifier gives its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from law import cut_at, whole
from subjects import SUBJECTS, WIDTH, N, Subject, inputs
from torch import Tensor
from toy_models import eager, mixed_knobs

from offramp_common.runner import Knobs
from offramp_common.spec import never_exit
from offramp_model.exits import Decision
from offramp_model.split_model import MultiExitModel, TorchLayers

NAN, INF = math.nan, math.inf
Bad = Callable[[Tensor], Tensor]


def first_is(value: float) -> Bad:
    """The first class alone: the others stay what they are."""
    return lambda z_BC: torch.cat([torch.full_like(z_BC[:, :1], value), z_BC[:, 1:]], dim=1)


def all_are(value: float) -> Bad:
    return lambda z_BC: torch.full_like(z_BC, value)


BAD = {
    "one NaN": first_is(NAN),
    "all NaN": all_are(NAN),
    "one +inf": first_is(INF),
    "one -inf": first_is(-INF),
    "all +inf": all_are(INF),
    "all -inf": all_are(-INF),
}
ROWS, BROKEN = 5, 2


@pytest.fixture(scope="module", params=SUBJECTS, ids="-".join)
def model(request: pytest.FixtureRequest) -> MultiExitModel:
    return Subject(*request.param).model()


@pytest.fixture(scope="module")
def points(model: MultiExitModel) -> list[Knobs]:
    return [eager(model), mixed_knobs(model), never_exit(model.knobs, N)]


@contextmanager
def broken(model: MultiExitModel, depth: int, row: int, bad: Bad) -> Iterator[None]:
    """Inside, what the exit at `depth`, and no other, says of this row is bad.

    Where an exit has no classifier (Class Means), the features that it measures from are.
    """
    exit = model.head(depth)
    assert exit is not None
    before, exit.branch = exit.branch, copy.deepcopy(exit.branch)  # exits may share a head
    names = {name for name, _ in exit.branch.named_children()}

    def spoilt(x: Tensor) -> Tensor:
        wrong_B = torch.arange(len(x)) == row
        flat = x.flatten(1)
        return torch.where(wrong_B.unsqueeze(1), bad(flat), flat).view_as(x)

    if "classifier" in names:
        exit.branch.get_submodule("classifier").register_forward_hook(lambda m, x, z: spoilt(z))
    else:
        exit.branch.register_forward_pre_hook(lambda m, x: (spoilt(x[0]), *x[1:]))
    try:
        yield
    finally:
        exit.branch = before


@torch.inference_mode()
def decisions(model: MultiExitModel, knobs: Knobs) -> list[tuple[Decision, Tensor]]:
    """(decision, logits) at each exit of some random hidden states, the state passed on."""
    generator = torch.Generator().manual_seed(4)
    hidden_LBTD = torch.randn(N, ROWS, 6, WIDTH, generator=generator)
    mask_BT, state, made = torch.ones(ROWS, 6, dtype=torch.bool), dict[str, Tensor](), []
    for depth in range(1, N + 1):
        head = model.head(depth)
        assert head is not None
        here = {name: torch.tensor(values[depth - 1]) for name, values in knobs.items()}
        decision, outputs = head(hidden_LBTD[depth - 1], mask_BT, state, here)
        made.append((decision, outputs["logits"]))
        state = decision.state
    return made


@pytest.mark.parametrize("kind", BAD)
def test_logits_that_are_no_numbers_harm_no_other_row_and_give_a_confidence(
    model: MultiExitModel, points: list[Knobs], kind: str
) -> None:
    others = [row for row in range(ROWS) if row != BROKEN]
    for knobs in points:
        healthy = decisions(model, knobs)
        for depth in range(1, N + 1):
            with broken(model, depth, BROKEN, BAD[kind]):
                got = decisions(model, knobs)
            for (a, _), (b, _) in zip(got, healthy, strict=True):
                assert ((a.confidence_B >= 0) & (a.confidence_B <= 1)).all()
                assert torch.equal(a.leave_B[others], b.leave_B[others])
                assert torch.equal(a.confidence_B[others], b.confidence_B[others])
                assert torch.equal(a.answer[others], b.answer[others])
                assert all(torch.equal(a.state[n][others], v[others]) for n, v in b.state.items())


@pytest.mark.parametrize("kind", BAD)
def test_a_row_with_a_nan_among_its_logits_does_not_leave_at_that_exit(
    model: MultiExitModel, kind: str
) -> None:
    """Also not where infinite logits make one on their way to the answer."""
    for depth in range(1, N):
        with broken(model, depth, BROKEN, BAD[kind]):
            decision, logits_BC = decisions(model, eager(model))[depth - 1]
        if kind.endswith("NaN"):
            assert logits_BC[BROKEN].isnan().any(), "guards this test"
        if logits_BC[BROKEN].isnan().any():
            assert not decision.leave_B[BROKEN].item(), f"exit {depth}"
            assert decision.confidence_B[BROKEN].item() < 1.0


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_was_no_number_at_an_exit_obeys_the_law_at_every_split_point(
    model: MultiExitModel, points: list[Knobs], kind: str
) -> None:
    """Whatever of it is in the state crosses, and the cloud goes on with it."""
    layers, batch = TorchLayers(model), inputs(1)
    cuts = {depth: model.cut(depth) for depth in range(N)}
    for knobs in points:
        for depth in range(1, N):
            with broken(model, depth, 0, BAD[kind]):
                expected = whole(layers, batch, knobs)
                for k in range(N + 1):
                    assert cut_at(k, layers, batch, knobs, cuts).same_as(expected), f"split {k}"
