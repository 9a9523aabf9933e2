"""Gradients taken apart: projection, two losses over one graph, and a model moved aside."""

from __future__ import annotations

import pytest
import torch
from passes import make_pass, random_batch
from torch import Tensor
from toy_models import toy_model

from offramp_train.recipes import RECIPES
from offramp_train.recipes.gradients import (
    added,
    aligned,
    inner,
    learning,
    leave_gradient,
    moved_aside,
    two_gradients,
    without_conflict,
)
from offramp_train.recipes.recipe import Seen, early_sum, final_loss


def _pair(seed: int, agree: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Two random gradients of three parameters, of length 1, whose inner product has the wanted sign."""
    torch.manual_seed(seed)
    shapes = [(20, 30), (30,), (4, 5, 6)]
    u = [torch.randn(shape, dtype=dtype) for shape in shapes]
    v = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if (inner(u, v).item() > 0) != agree:
        v = [-x for x in v]
    return [x / inner(u, u).sqrt() for x in u], [x / inner(v, v).sqrt() for x in v]


def _filled(gradient: list[Tensor | None]) -> list[Tensor]:
    return [x for x in gradient if x is not None]


def test_a_projection_worked_out_by_hand() -> None:
    # s = (-3 - 8) / 25 = -0.44; v' = (-1, -2) + 0.44 (3, 4) = (0.32, -0.24), at right angles to u
    (got,) = _filled(without_conflict([torch.tensor([-1.0, -2.0])], [torch.tensor([3.0, 4.0])]))
    torch.testing.assert_close(got, torch.tensor([0.32, -0.24]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_conflicts_is_taken_out_and_nothing_is_added(seed: int, dtype: torch.dtype) -> None:
    u, v = _pair(seed, agree=False, dtype=dtype)
    projected = _filled(without_conflict(v, u))
    # Both are of length 1; the sheet's bound.
    assert abs(inner(projected, u).item()) < 1e-6
    assert inner(projected, projected) <= inner(v, v)
    assert inner(u, added(u, projected)) >= inner(u, u) - 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_what_agrees_stays_as_it_is_to_the_bit(seed: int) -> None:
    u, v = _pair(seed, agree=True, dtype=torch.float32)
    assert all(map(torch.equal, _filled(without_conflict(v, u)), v))
    assert inner(u, added(u, v)) >= inner(u, u) > 0


def test_the_opposite_of_the_reference_vanishes() -> None:
    u, _ = _pair(0, agree=True, dtype=torch.float32)
    gone = _filled(without_conflict([-x for x in u], u))
    assert all(x.count_nonzero() == 0 for x in gone)


def test_a_reference_that_is_zero_conflicts_with_nothing() -> None:
    v = [torch.tensor([1.0, -2.0])]
    (got,) = _filled(without_conflict(v, [torch.zeros(2)]))
    assert torch.equal(got, v[0])


def test_a_parameter_that_a_loss_does_not_depend_on_counts_as_zero() -> None:
    u, v = [torch.tensor([1.0]), torch.tensor([2.0]), None], [torch.tensor([-3.0]), None, None]
    # s = -3 / 5
    first, second, third = without_conflict(v, u)
    assert first is not None
    assert second is not None
    assert [first.item(), second.item()] == pytest.approx([-2.4, 1.2])
    assert third is None


def test_a_group_is_projected_as_one_vector_and_not_number_by_number() -> None:
    u = [torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1.0])]
    v = [torch.tensor([2.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]

    def numbers(groups: list[list[int]]) -> list[float]:
        return [x.item() for x in _filled(aligned(v, u, groups))]

    assert numbers([[0, 1, 2]]) == [2.0, -1.0, -1.0], "they agree: 2 - 1 - 1 = 0"
    assert numbers([[0], [1], [2]]) == [2.0, 0.0, 0.0]
    assert numbers([[1, 0]]) == [2.0, -1.0, -1.0]
    assert numbers([[1]]) == [2.0, 0.0, -1.0], "what is in no group stays"


def test_two_gradients_are_those_of_the_losses_alone_and_their_sum_that_of_the_sum() -> None:
    model = toy_model(seed=2)
    batches = [random_batch(1), random_batch(2, rows=5)]

    def both(seen: Seen) -> tuple[Tensor, Tensor]:
        return final_loss(seen), early_sum(seen)

    work = make_pass(model, RECIPES["deebert"], batches)
    total, u, v = two_gradients(work, both)
    leave_gradient(model, added(u, v))
    got = [p.grad for p in learning(model)]
    model.zero_grad()
    expected = 0.0
    for batch in batches:
        loss = sum(both(work.see(batch)), torch.zeros(())) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        expected += loss.item()
    assert total == pytest.approx(expected)
    for x, parameter in zip(got, learning(model), strict=True):
        assert x is not None
        # Float32 sums in another order.
        torch.testing.assert_close(x, parameter.grad, rtol=1e-4, atol=1e-6)
    early = {id(p) for depth in ("1", "2") for p in model.exits[depth].parameters()}
    for parameter, x in zip(learning(model), u, strict=True):
        assert (x is None) == (id(parameter) in early), "the final exit knows nothing of these"


def test_a_model_moved_aside_is_back_to_the_bit_whatever_happens() -> None:
    model = toy_model(seed=2)
    parameters = learning(model)
    before = [p.detach().clone() for p in parameters]
    direction = [torch.ones_like(p) for p in parameters[:-1]] + [None]

    def interrupted() -> None:
        with moved_aside(parameters, direction, 0.1):
            assert torch.equal(parameters[0], before[0] + 0.1)
            assert torch.equal(parameters[-1], before[-1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(map(torch.equal, parameters, before))
