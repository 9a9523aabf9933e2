"""What turns gradients into weights: the rates, AdamW's groups, and a running mean of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp_model.split_model import MultiExitModel
from offramp_train.config import Training


class RunningMean:
    """An exponential mean of the weights that learn (EMA), with a short warm-up."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.means = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model has the means for weights."""
        originals = [p.data for p in self.parameters]
        try:
            for parameter, mean in zip(self.parameters, self.means, strict=True):
                parameter.data = mean
            yield
        finally:
            for parameter, data in zip(self.parameters, originals, strict=True):
                parameter.data = data


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear rise over the first `warmup` of the updates, linear fall to 0 after; 1 at the peak."""
    warm = int(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return (steps - step) / max(steps - warm, 1)


def optimiser(
    model: MultiExitModel, extra: nn.Module | None, settings: Training
) -> torch.optim.AdamW:
    """AdamW; biases and norms do not decay; exit heads and `extra` have rates of their own."""
    heads = {id(p) for p in model.exits.parameters()}
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in heads, parameter.dim() > 1)
            groups.setdefault(key, []).append(parameter)
    chosen: list[dict[str, Any]] = [
        {
            "params": parameters,
            "peak": (settings.head_lr or settings.lr) if head else settings.lr,
            "weight_decay": settings.weight_decay if matrix else 0.0,
        }
        for (head, matrix), parameters in groups.items()
    ]
    if extra is not None:
        parameters = list(extra.parameters())
        chosen.append({"params": parameters, "peak": settings.extra_lr, "weight_decay": 0.0})
    return torch.optim.AdamW(chosen, lr=settings.lr, fused=True)
