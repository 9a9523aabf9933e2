"""The recipe of ensemble internal classifiers: accuracy, and diversity in the wrong classes. Sun et al.,
arXiv 2021. See offramp_model.methods.ensemble_ic.

    loss = sum_i CE(p_i, y) - beta * sum_(i >= 2) div_i
    div_i = min_(j < i) CE(stopgrad(q_j), q_i), q being p without the gold class, scaled to sum 1

With two classes q is a single 1: div is 0 and the exits are trained for accuracy alone.

Differs from the paper:
1. The diversity term is a reconstruction: the abstract says that there is one, others' surveys that exits
   should agree on the right class and spread over the wrong ones. No official code is known.
2. The smallest CE is taken row by row, and div is clipped at 2 ln(C - 1): without a bound an exit could earn
   any reward by saying 0.
Not verified: the weights of the exits' losses (here equal), beta, and the optimiser's settings.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offramp_train.recipes.recipe import Recipe, Seen, Setting, Stage, gradients_of


def log_wrong(logits_BC: Tensor, target_B: Tensor) -> Tensor:
    """ln q, (B, C - 1): the classes that are not the target, in order."""
    n_classes = logits_BC.shape[1]
    wrong_BC = torch.arange(n_classes, device=target_B.device) != target_B.unsqueeze(-1)
    return torch.log_softmax(logits_BC[wrong_BC].view(-1, n_classes - 1), dim=-1)


def diversity(seen: Seen) -> Tensor:
    """The sum of div_i over all exits but the first, the mean over rows, a scalar."""
    log_q = [log_wrong(answer, seen.target_B) for answer in seen.answers.values()]
    bound = 2 * math.log(max(len(seen.task.labels) - 1, 1))
    total = torch.zeros(())
    for i in range(1, len(log_q)):
        earlier = [-(q.detach().exp() * log_q[i]).sum(dim=-1) for q in log_q[:i]]
        nearest_B = torch.stack(earlier).amin(dim=0).clamp(max=bound)
        total = total + seen.mean(nearest_B)
    return total


def accurate_and_diverse(seen: Seen) -> Tensor:
    """The plain sum of the exits' losses, less beta times their diversity."""
    accuracy = torch.stack(list(seen.losses().values())).sum()
    beta: float = seen.settings["beta"]
    return accuracy - beta * diversity(seen)


RECIPE = Recipe(
    name="ensemble_ic",
    summary="everything at once, exits' losses added up, less a reward for erring in different ways",
    source="Early Exiting with Ensemble Internal Classifiers",
    stages=(Stage("all exits", "all", "all", gradients_of(accurate_and_diverse)),),
    defaults={
        "max_tokens": 128,
        "training": {"lr": 3e-5, "batch": 32, "epochs": 4, "keep": "last"},
    },
    settings=(Setting("beta", 0.05, "weight of the diversity", 0.0, 10.0),),
    tasks=("classification",),
)
