"""DACT-BERT's recipe: plain fine-tuning, then everything jointly on the mixture of all exits. Eyzaguirre et
al., NLP-Power workshop at ACL 2022. See offramp_model.methods.dact_bert.

The second stage's loss, with shares h_n and weights left p_n: -log(a_N[label] + 1e-12) + tau R, where R is
the sum over exits of h_n (`reg = "h"`) or of p_n ("p").

Differs from the paper:
1. For values the first term is the squared error of the mixture a_N; the paper has classes only.
2. n counts exits, where exits stand after some layers only.
3. tau is 0.005 unless told otherwise, from the middle of the range that was tried with an unofficial
   implementation; it is the choice between speed and quality, and one model is trained for each.
Not verified: which R the paper has (its forerunner DACT sums p_n), and the rates and epochs of its stages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp_train.recipes.recipe import Recipe, Seen, Setting, Stage, final_loss, gradients_of

_LEAST_SHARE = 1e-12


def mixture(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """(a_N (B, C), h_n, p_n (N, B)) as the policy makes them, with gradients."""
    share_NB = torch.stack(list(seen.named("go_on").values())).sigmoid()
    answers = list(seen.answers.values())
    p_B, weights = torch.ones_like(share_NB[0]), []
    a_BC = torch.zeros_like(answers[0])
    for answer_BC, share_B in zip(answers, share_NB, strict=True):
        y_BC = answer_BC if seen.task.kind == "regression" else answer_BC.softmax(dim=-1)
        a_BC = p_B.unsqueeze(1) * y_BC + (1.0 - p_B.unsqueeze(1)) * a_BC
        p_B = p_B * share_B
        weights.append(p_B)
    return a_BC, share_NB, torch.stack(weights)


def mixture_loss(seen: Seen) -> Tensor:
    """-log of the mixture's probability of the label (values: its squared error) + tau R."""
    a_BC, share_NB, weight_NB = mixture(seen)
    if seen.task.kind == "regression":
        loss_B = seen.row_losses(a_BC)
    else:
        # a is a probability already: no softmax of it again.
        loss_B = -torch.log(a_BC.gather(1, seen.target_B.unsqueeze(1))[:, 0] + _LEAST_SHARE)
    counted_NB = share_NB if seen.settings["reg"] == "h" else weight_NB
    return seen.mean(loss_B + seen.settings["tau"] * counted_NB.sum(dim=0))


RECIPE = Recipe(
    name="dact_bert",
    summary="plain fine-tuning first; then everything jointly on the mixture of all exits' answers",
    source="DACT-BERT",
    stages=(
        Stage("backbone and final head", "backbone+final", "final", gradients_of(final_loss)),
        Stage("all exits, jointly", "all", "final", gradients_of(mixture_loss)),
    ),
    defaults={
        "max_tokens": 128,
        "training": {"lr": 2e-5, "batch": 32, "epochs": 3, "keep": "last"},
    },
    settings=(
        Setting("tau", 5e-3, "weight of R: more leaves earlier"),
        Setting("reg", "h", "R is the sum of h_n or of p_n", choices=("h", "p")),
    ),
    needs=("logits", "go_on"),
    teaches=("logits", "go_on"),
)
