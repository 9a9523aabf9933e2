"""PALBERT's recipe: the exit as a hidden variable with a prior on the depth. Balagansky, Gavrilov, NeurIPS
2022. See offramp_model.methods.palbert.

The loss is sum_n p_n l_n + beta KL(g || p), the mean over rows: l_n is exit n's loss, p_n the chance to stop
there, g a geometric prior whose last entry is what is left: g_n = c (1 - c)^(n-1), c = `prior`.

Differs from the paper:
1. The last exit's chance is what is left, p_N = s_(N-1), in both terms, as it is in use. In the official
   code it is lambda_N s_(N-1), so that the chances do not add up to 1.
2. Chances are worked out as logarithms, and need no guard. In the official code, once less than 0.05 is
   left, every further chance is a constant, and layers stop when that is so of all samples.
3. n counts exits, where exits stand after some layers only; the prior is over as many.
4. Ten epochs, the best on dev kept; the official code has 25 at most and stops after 5 without a gain.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from offramp_train.recipes.recipe import Recipe, Seen, Setting, Stage, gradients_of


def log_chances(seen: Seen) -> Tensor:
    """log p_n of each exit, (N, B); their exponentials add up to 1 in each row."""
    stop_NB = torch.stack(list(seen.named("stop").values()))
    zero_1B = torch.zeros_like(stop_NB[:1])
    # log s before each exit; the last takes all that is left, whatever its lambda.
    left_NB = torch.cat([zero_1B, logsigmoid(-stop_NB[:-1]).cumsum(dim=0)])
    return left_NB + torch.cat([logsigmoid(stop_NB[:-1]), zero_1B])


def log_prior(c: float, n: int) -> Tensor:
    """log g_1 .. log g_n."""
    early = [math.log(c) + i * math.log1p(-c) for i in range(n - 1)]
    return torch.tensor([*early, (n - 1) * math.log1p(-c)])


def ponder_loss(seen: Seen) -> Tensor:
    """The expected loss over exits, and beta times how far the chances are from the prior."""
    log_p_NB = log_chances(seen)
    loss_NB = torch.stack([seen.row_losses(answer) for answer in seen.answers.values()])
    log_g_N1 = log_prior(seen.settings["prior"], len(log_p_NB)).unsqueeze(1).to(log_p_NB)
    kl_B = (log_g_N1.exp() * (log_g_N1 - log_p_NB)).sum(dim=0)
    return seen.mean((log_p_NB.exp() * loss_NB).sum(dim=0) + seen.settings["beta"] * kl_B)


RECIPE = Recipe(
    name="palbert",
    summary="everything at once: the loss expected over where a sample stops, and a prior on the depth",
    source="PALBERT",
    stages=(Stage("all exits", "all", "all", gradients_of(ponder_loss)),),
    # The official code's: Adam without weight decay or warm-up.
    defaults={
        "max_tokens": 128,
        "training": {"lr": 1e-5, "batch": 32, "epochs": 10, "keep": "best"},
    },
    settings=(
        Setting("beta", 0.5, "weight of the distance from the prior"),
        Setting("prior", 0.1, "chance to stop at each exit; its inverse is about the depth", 1e-3, 0.999),
    ),
    needs=("logits", "stop"),
    teaches=("logits", "stop"),
)  # fmt: skip
