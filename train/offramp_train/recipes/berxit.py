"""BERxiT's recipe: updates of the final exit alone, and of all exits, in turn; and a judge of every exit
where the method has one. Xin et al., EACL 2021. See offramp_model.methods.berxit.

Losses are sums over exits, l_i at exit i, l_L at the final one, J the judges' (`judged`):

    variant       even updates        odd updates
    alternating   l_L                 l_1 + ... + l_(L-1) + l_L
      and "wrong" l_L + J             l_1 + ... + l_(L-1) + J
    joint         l_1 + ... + l_L, + J where there is "wrong", in every update

Differs from the paper:
1. Updates are counted over the whole stage. The official code counts within an epoch, so that with an odd
   number of batches two even updates follow each other.
2. What has no gradient in an update is left alone by the optimiser; in the official code the momentum of the
   update before still moves the early exits.
3. With `joint` and "wrong" J is added; the paper has that variant without J only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offramp_common.errors import ConfigError
from offramp_model.split_model import MultiExitModel
from offramp_train.recipes.recipe import Recipe, Seen, Setting, Stage, gradients_of


def wrong_targets(seen: Seen, answer_BC: Tensor) -> Tensor:
    """What "wrong" should be, (B,), without gradient: 0 or 1; for values tanh of the error, in [0, 1]."""
    if seen.task.kind == "regression":
        return (answer_BC[:, 0] - seen.target_B).abs().tanh().detach()
    return (answer_BC.argmax(dim=-1) != seen.target_B).float()


def judged(seen: Seen) -> Tensor:
    """J: the squared distance of "wrong" from its target, the mean over exits and rows."""
    wrong, answers = seen.named("wrong"), seen.answers
    errors = [seen.mean((w - wrong_targets(seen, answers[d])).square()) for d, w in wrong.items()]
    return torch.stack(errors).mean()


def berxit_loss(seen: Seen) -> Tensor:
    """The loss of this update: see the table above."""
    *early, final = seen.losses().values()
    judges, even = bool(seen.named("wrong")), seen.progress.step % 2 == 0
    if seen.settings["variant"] == "joint" or not (even or judges):
        total = torch.stack([*early, final]).sum()
    else:
        total = final if even else torch.stack(early).sum()
    return total + judged(seen) if judges else total


def _check(model: MultiExitModel, settings: Mapping[str, Any]) -> None:
    if len(model.spec.exits) < 2 and settings["variant"] == "alternating":
        raise ConfigError(
            f"recipe berxit takes the final exit and the early ones in turn, and exits "
            f"{model.spec.exits} has only the final one; add exits, or loss.variant = 'joint'"
        )


RECIPE = Recipe(
    name="berxit",
    summary="the final exit alone and all exits, in turn; with a judge of each exit where there is one",
    source="BERxiT",
    stages=(Stage("all exits", "all", "all", gradients_of(berxit_loss)),),
    # The official code's for BERT: no warm-up, no weight decay.
    defaults={
        "max_tokens": 128,
        "training": {"lr": 2e-5, "batch": 8, "epochs": 3, "keep": "last"},
    },
    settings=(
        Setting(
            "variant",
            "alternating",
            "the final exit and all of them in turn, or all in every update",
            choices=("alternating", "joint"),
        ),
    ),
    teaches=("logits", "wrong"),
    check=_check,
)
