"""RomeBERT's recipe: one stage, early exits learn from the final one, conflicts with it are taken out of the
gradient. Geng, Gao, Fu, Zhang, arXiv 2021. See offramp_model.methods.romebert.

    l_last = CE(z_L, y)         l_multi = sum_(i<L) (1 - gamma) CE(z_i, y)
    l_dist = sum_(i<L) gamma T^2 KL(softmax(z_L / T) || softmax(z_i / T)) / C, z_L detached

"sd" minimises l_last + l_multi + l_dist. "sd+gr" takes the gradients u of the reference loss and v of the
other (l_last; l_multi + l_dist) apart, by two backward passes over one forward pass: over the weight matrices
of the layers 1..L-1, as one long vector, v' = v - min(<v, u> / <u, u>, 0) u, and the update is u + v'.
Biases, norms, the last layer, embeddings and heads get u + v. Which loss is the reference is the data set's:
the paper's code has "final" for its two largest sets (MNLI, QQP), "exits" for the others.

The KL is the mean over rows and classes, as in the code: with T^2 and gamma that makes its strength.

Differs from the paper:
1. With several batches to an update their mean gradients are projected, once; the official code projects
   sums that mix micro-batches.
2. The official code's other options (momentum teacher, teaching assistants, grouped losses, gradients
   scaled by 1 / (L - i)) are no part of the method and left out.
3. Exits may stand after some layers only; a matrix that layers share (ALBERT) counts once, and does if any
   of the layers 1..L-1 has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp_model.split_model import MultiExitModel
from offramp_train.recipes.gradients import (
    added,
    aligned,
    learning,
    leave_gradient,
    two_gradients,
)
from offramp_train.recipes.recipe import (
    Pass,
    Recipe,
    Seen,
    Setting,
    Stage,
    divergence,
    final_loss,
    needs_early_exits,
)


def exits_loss(seen: Seen) -> Tensor:
    """l_multi + l_dist."""
    gamma, temperature = seen.settings["gamma"], seen.settings["temperature"]
    losses, answers = seen.losses(), seen.answers
    teacher_BC = answers[seen.exits[-1]].detach()
    n_classes = teacher_BC.shape[1]
    terms = []
    for depth in seen.exits[:-1]:
        apart_B = divergence(answers[depth], teacher_BC, seen.task, temperature)
        distance = seen.mean(apart_B) / n_classes
        terms.append((1.0 - gamma) * losses[depth] + gamma * distance)
    return torch.stack(terms).sum()


def reference_and_other(seen: Seen) -> tuple[Tensor, Tensor | None]:
    """The two losses that are kept apart; with "sd" one, their sum."""
    final, exits = final_loss(seen), exits_loss(seen)
    if seen.settings["variant"] == "sd":
        return final + exits, None
    return (final, exits) if seen.settings["reference"] == "final" else (exits, final)


def early_matrices(model: MultiExitModel) -> list[int]:
    """Which of the learning parameters are weight matrices of the layers 1..L-1."""
    wanted = {id(p) for layer in model.backbone.layers[:-1] for p in layer.parameters()}
    return [i for i, p in enumerate(learning(model)) if id(p) in wanted and p.dim() > 1]


def regularised(work: Pass) -> float:
    """Leaves u + v' and returns the sum of the losses."""
    total, u, v = two_gradients(work, reference_and_other)
    leave_gradient(work.model, added(u, aligned(v, u, [early_matrices(work.model)])))
    return total


RECIPE = Recipe(
    name="romebert",
    summary="everything at once, early exits learn from the final one, conflicting gradients projected",
    source="RomeBERT",
    stages=(Stage("all exits", "all", "all", regularised),),
    # The official code's for BERT-base: 3 epochs (10 for RoBERTa), the last weights.
    defaults={
        "max_tokens": 128,
        "training": {"lr": 2e-5, "batch": 8, "epochs": 3, "keep": "last"},
    },
    settings=(
        Setting("variant", "sd+gr", "distillation alone, or with projection", choices=("sd", "sd+gr")),
        Setting("reference", "exits", "the loss that gives way to none", choices=("exits", "final")),
        Setting("gamma", 0.9, "share of an early exit's loss that is distillation", 0.0, 1.0),
        Setting("temperature", 3.0, "T, of both softmaxes in the distillation", 1e-3),
    ),
    tasks=("classification",),
    check=needs_early_exits,
)  # fmt: skip
