"""Gradients taken apart and put together again, for recipes whose losses pull against each other, and a model
moved aside for a look.

A gradient is a list with a tensor for each parameter that learns, in the model's order; None where the loss
does not depend on the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from offramp_model.split_model import MultiExitModel
from offramp_train.recipes.recipe import Pass, Seen

Gradient = Sequence[Tensor | None]
TwoLosses = Callable[[Seen], tuple[Tensor, Tensor | None]]
"""Both losses of one forward pass. Without a second there is one backward pass and no conflict."""


def learning(model: MultiExitModel) -> list[Tensor]:
    """The parameters that learn in this stage, shared ones once."""
    return [p for p in model.parameters() if p.requires_grad]


def added(a: Gradient, b: Gradient) -> list[Tensor | None]:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def inner(a: Gradient, b: Gradient) -> Tensor:
    """The inner product over all parameters together, a scalar."""
    products = [
        torch.dot(x.flatten(), y.flatten())
        for x, y in zip(a, b, strict=True)
        if x is not None and y is not None
    ]
    return torch.stack(products).sum() if products else torch.zeros(())


def without_conflict(moved: Gradient, reference: Gradient) -> list[Tensor | None]:
    """v - min(s, 0) u with s = <v, u> / <u, u>: v without what points against the reference u.

    As v is, where <v, u> >= 0 or u is 0.
    """
    # u = 0 makes s 0 / tiny = 0: nothing to conflict with.
    least = torch.finfo(torch.float32).tiny
    share = inner(moved, reference) / inner(reference, reference).clamp(min=least)
    away = -share.clamp(max=0.0)
    return added(moved, [None if u is None else away * u for u in reference])


def aligned(
    moved: Gradient, reference: Gradient, groups: Sequence[Sequence[int]]
) -> list[Tensor | None]:
    """`without_conflict` within each group of parameters (their indices); those in none stay as they are."""
    out = list(moved)
    for group in groups:
        cleared = without_conflict([moved[i] for i in group], [reference[i] for i in group])
        for index, gradient in zip(group, cleared, strict=True):
            out[index] = gradient
    return out


def two_gradients(
    work: Pass, losses: TwoLosses
) -> tuple[float, list[Tensor | None], list[Tensor | None]]:
    """(both losses' sum, the first's gradient, the second's), each the mean over the update's batches.

    One forward pass a batch, and a backward pass for each loss over the same graph. Means are taken before
    anything is projected, so micro-batches do not mix.
    """
    parameters, share = learning(work.model), len(work.batches)
    total = 0.0
    first: list[Tensor | None] = [None] * len(parameters)
    second = list(first)
    for batch in work.batches:
        a, b = losses(work.see(batch))
        got = torch.autograd.grad(
            a / share, parameters, retain_graph=b is not None, allow_unused=True
        )
        first, total = added(first, got), total + a.item()
        if b is not None:
            second = added(second, torch.autograd.grad(b / share, parameters, allow_unused=True))
            total += b.item()
    return total / share, first, second


def leave_gradient(model: MultiExitModel, gradient: Gradient) -> None:
    """Where the optimiser looks for it."""
    for parameter, value in zip(learning(model), gradient, strict=True):
        # A copy: autograd may give the same memory to two parameters, and clipping works in place.
        parameter.grad = None if value is None else value.clone()


@contextmanager
def moved_aside(parameters: Sequence[Tensor], direction: Gradient, by: float) -> Iterator[None]:
    """Inside, parameters stand at theta + by * direction; after it, at theta again, to the bit.

    A backward pass inside must be of a forward pass inside, and the other way round.
    """
    originals = [p.data for p in parameters]
    try:
        for parameter, way in zip(parameters, direction, strict=True):
            if way is not None:
                parameter.data = torch.add(parameter.data, way, alpha=by)
        yield
    finally:
        for parameter, data in zip(parameters, originals, strict=True):
            parameter.data = data
