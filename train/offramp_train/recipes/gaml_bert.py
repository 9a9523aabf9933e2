"""GAML-BERT's recipe: all exits teach each other, and what of that pulls against the labels is dropped. Zhu,
Wang, Ni, Xie, EMNLP 2021. See offramp_model.methods.gaml_bert.

    L_CE = sum_i w_i CE(z_i, y)         w_i = depth of exit i / the sum of depths
    L_KD = sum_i w_i sum_(j != i) T^2 KL(softmax(z_j / T) || softmax(z_i / T)) / (L - 1); z_j detached

One forward pass and two backward passes an update give g, the gradient of L_CE, and k, of lambda L_KD. Where
<k, g> < 0 over a group of parameters, k there becomes k - <k, g> / <g, g> g. The update is g + k. The first
epochs have lambda 0: plain joint training, one backward pass.

Differs from the paper, of which the abstract alone was at hand:
1. That exits teach each other, both ways, and that distillation gradients are aligned with the labels' is the
   paper's. The form of the projection, the weights of the teachers, the groups, T, lambda and the warm-up
   are ours.
2. "model" takes all parameters as one group. With "layer" each layer is one, the embeddings are one and so is
   each exit head; what several have in common counts where it stands first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
    depth_weighted,
    mutual_divergence,
    needs_early_exits,
)


def mutual_loss(seen: Seen) -> Tensor:
    """L_KD."""
    apart_E = mutual_divergence(seen, seen.settings["temperature"]).sum(dim=1)
    weight_E = torch.tensor(seen.exits, dtype=apart_E.dtype) / sum(seen.exits)
    return (weight_E * apart_E).sum() / (len(seen.exits) - 1)


def labels_and_mutual(seen: Seen) -> tuple[Tensor, Tensor | None]:
    """L_CE and lambda L_KD, where it counts."""
    strength = seen.settings["lambda"]
    if strength == 0 or seen.progress.epoch < seen.settings["warmup_epochs"]:
        return depth_weighted(seen), None
    return depth_weighted(seen), strength * mutual_loss(seen)


def parameter_groups(model: MultiExitModel, by: str) -> list[list[int]]:
    """Indices of the learning parameters that are projected together."""
    parameters = learning(model)
    if by == "model":
        return [list(range(len(parameters)))]
    backbone = model.backbone
    owners: Sequence[nn.Module] = (
        backbone.embeddings,
        backbone.shared,
        *backbone.layers,
        *model.exits.values(),
    )
    owner_of: dict[int, int] = {}
    for number, owner in enumerate(owners):
        for parameter in owner.parameters():
            owner_of.setdefault(id(parameter), number)
    groups: dict[int, list[int]] = {}
    for index, learned in enumerate(parameters):
        groups.setdefault(owner_of[id(learned)], []).append(index)
    return list(groups.values())


def gradient_aligned(work: Pass) -> float:
    """Leaves g + k and returns the sum of the losses."""
    total, g, k = two_gradients(work, labels_and_mutual)
    if any(gradient is not None for gradient in k):
        k = aligned(k, g, parameter_groups(work.model, work.settings["groups"]))
    leave_gradient(work.model, added(g, k))
    return total


RECIPE = Recipe(
    name="gaml_bert",
    summary="everything at once, exits teach each other as far as the labels' gradients allow",
    source="GAML-BERT",
    stages=(Stage("all exits", "all", "all", gradient_aligned),),
    defaults={
        "max_tokens": 128,
        "training": {"lr": 2e-5, "batch": 32, "epochs": 5, "keep": "best"},
    },
    settings=(
        Setting("lambda", 0.5, "weight of what exits teach each other"),
        Setting("temperature", 2.0, "T, of both softmaxes in it", 1e-3),
        Setting("warmup_epochs", 1.0, "first epochs without it"),
        Setting("groups", "model", "parameters that are projected together", choices=("model", "layer")),
    ),
    tasks=("classification",),
    check=needs_early_exits,
)  # fmt: skip
