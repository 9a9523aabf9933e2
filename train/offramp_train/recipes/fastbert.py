"""FastBERT's recipe: fine-tuning, then self-distillation without labels. Liu et al., ACL 2020. See
offramp_model.methods.fastbert.

Differs from the paper:
1. The divergence is KL(teacher || student), as in the official code; the paper's formula is written the other
   way round, KL(student || teacher) (not verified).
2. Students see the training rows without their labels; the paper may add unlabelled ones.
3. The best epoch on dev is kept in both stages; the official code does so in the first, and keeps the last
   of the second.
4. Gradients are clipped, as in all recipes here; the official code does not.
As in the official code, what is frozen keeps its dropout in the second stage, the teacher too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp_train.recipes.recipe import Recipe, Seen, Stage, divergence, final_loss, gradients_of


def taught(seen: Seen) -> Tensor:
    """The sum over early exits i of KL(p_final || p_i), each the mean over rows."""
    answers = seen.answers
    teacher_BC = answers[seen.exits[-1]].detach()
    apart = [seen.mean(divergence(answers[d], teacher_BC, seen.task)) for d in seen.exits[:-1]]
    return torch.stack(apart).sum()


RECIPE = Recipe(
    name="fastbert",
    summary="the backbone and the final head first; then the early exits copy it, without labels",
    source="FastBERT",
    stages=(
        Stage("backbone and teacher", "backbone+final", "final", gradients_of(final_loss)),
        Stage("students", "early exits", "early", gradients_of(taught)),
    ),
    # The official code's; 5 epochs for the students as in its README (10 by default).
    defaults={
        "max_tokens": 128,
        "training": {
            "lr": 2e-5, "stage_lr": [2e-5, 2e-4], "stage_epochs": [3, 5], "batch": 32,
            "warmup": 0.1, "weight_decay": 0.01, "keep": "best",
        },
    },
    tasks=("classification",),
)  # fmt: skip
