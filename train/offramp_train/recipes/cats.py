"""CATs' recipe: plain fine-tuning, and early heads on what is then frozen. Schuster, Fisch, Jaakkola,
Barzilay, EMNLP 2021. See offramp_model.methods.cats.

What its exits need beside their heads, temperatures and meta classifiers, is fitted after it
(offramp_train.fits.cats), and lambda comes from `calibrate --epsilon`. dev is kept for that last step
alone: the last epoch is kept, not the best on dev.

Differs from the paper: nothing known. Not verified: rates and epochs, which are here as in DeeBERT's recipe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp_train.recipes.recipe import Recipe, Seen, Setting, Stage, final_loss, gradients_of


def early_mean(seen: Seen) -> Tensor:
    """The mean over the early exits, equal weights, of the loss on what `target` says.

    "labels"      the labels
    "full-model"  the final exit's class or value: the paper's consistency loss
    """
    *early, last = seen.exits
    if seen.settings["target"] == "labels":
        losses = [seen.mean(seen.row_losses(seen.answers[depth])) for depth in early]
        return torch.stack(losses).mean()
    full_BC = seen.answers[last].detach()
    losses = []
    for depth in early:
        if seen.task.kind == "regression":
            loss_B = (seen.answers[depth] - full_BC).square()[:, 0]
        else:
            loss_B = torch.nn.functional.cross_entropy(
                seen.answers[depth], full_BC.argmax(dim=-1), reduction="none"
            )
        losses.append(seen.mean(loss_B))
    return torch.stack(losses).mean()


RECIPE = Recipe(
    name="cats",
    summary="the backbone and the final head first; then the early exits' mean on what is frozen",
    source="CATs",
    stages=(
        Stage("backbone and final head", "backbone+final", "final", gradients_of(final_loss)),
        Stage("early exits", "early exits", "early", gradients_of(early_mean), quiet=True),
    ),
    defaults={
        "max_tokens": 128,
        "training": {"lr": 2e-5, "batch": 8, "epochs": 3, "keep": "last"},
        "calibration": {"epsilon": 0.1},
    },
    settings=(
        Setting(
            "target",
            "labels",
            "what early exits learn: the labels, or the full model's answers",
            choices=("labels", "full-model"),
        ),
    ),
)
