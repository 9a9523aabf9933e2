"""ELBERT's recipe: all exits at once, with learned weights of their losses. Xie et al., ICASSP 2021. See
offramp_model.methods.elbert.

    loss = sum_i w_i l_i,  w_i = sigmoid(a_i) for every exit but the last,  w_last = n - the sum of the others

n is the number of exits (L in the paper, with an exit after every layer), so that the weights always sum to
it. The a_i start at 4 (w = 0.982) and have a learning rate of their own, training.extra_lr.

Differs from the paper:
1. The a_i are saved with checkpoints, so that a stopped run goes on as if it had not stopped; the official
   code keeps them in a tensor that no checkpoint has. They are of no use after training: no bundle has them.
2. Values are trained on squared errors in the same way; the paper has classification only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp_model.split_model import MultiExitModel
from offramp_train.recipes.recipe import Recipe, Seen, Setting, Stage, gradients_of

_START = 4.0


class LossWeights(nn.Module):
    """Weights of n exits' losses that sum to n."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.a = nn.Parameter(torch.full((n - 1,), _START))

    def forward(self) -> Tensor:
        """(n,), shallowest first."""
        early = torch.sigmoid(self.a)
        return torch.cat([early, (self.n - early.sum()).unsqueeze(0)])


def weighted(seen: Seen) -> Tensor:
    """The exits' losses times their weights, added up."""
    losses = torch.stack(list(seen.losses().values()))
    if seen.settings["weights"] == "equal":
        return losses.sum()
    assert seen.extra is not None, "the recipe makes it"
    total: Tensor = (seen.extra() * losses).sum()
    return total


def _extra(model: MultiExitModel, settings: Mapping[str, Any]) -> nn.Module:
    return LossWeights(len(model.spec.exits))


RECIPE = Recipe(
    name="elbert",
    summary="everything at once, with learned weights of the exits' losses",
    source="ELBERT",
    stages=(Stage("all exits", "all", "all", gradients_of(weighted)),),
    # The official code's: no dropout in the heads.
    defaults={
        "max_tokens": 128,
        "training": {"lr": 3e-5, "batch": 32, "epochs": 3, "dropout": 0.0, "extra_lr": 1e-2},
    },
    settings=(
        Setting(
            "weights",
            "learned",
            "of the exits' losses: learned, or equal",
            choices=("learned", "equal"),
        ),
    ),
    extra=_extra,
)
