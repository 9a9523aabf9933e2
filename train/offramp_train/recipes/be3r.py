"""BE3R's recipe: a mixture of experts by the routers' chances, and a price on depth. Mangrulkar et al., KDD
2022. See offramp_model.methods.be3r.

With pi_j the chance to stop at exit j, of depth e_j, and l_j that exit's loss:

    sum_j pi_j l_j  +  mu sum_j pi_j e_j / N  +  nu mean_j l_j  +  load sum_j (m_j - target_j)^2

and m_j the mean of pi_j over rows. The first epoch has mu = 0 and nu = 1 and no load term, so that experts
are of use before routers choose.

Differs from the paper: the paper was not available; this is a reconstruction, all of it.
1. `hard`: for so large a last share of the updates routers choose 0 or 1 in the forward pass, as in use, with
   the gradient of the chance. Off unless asked for.
2. The load term is off unless asked for. `load_target` gives a share of rows for each exit; empty: equal.
3. For values l_j is the squared error.
4. A training of a single epoch has no price on depth at all; take two at least.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offramp_common.errors import ConfigError
from offramp_model.split_model import MultiExitModel
from offramp_train.recipes.recipe import Recipe, Seen, Setting, Stage, gradients_of

_ROUNDING = 1e-6


def stop_shares(seen: Seen) -> Tensor:
    """pi_j of each exit, (E, B); they add up to 1 in each row."""
    *early, last = seen.exits
    progress, route = seen.progress, seen.named("route")
    hard = progress.step >= (1.0 - seen.settings["hard"]) * progress.steps
    left_B, shares = torch.ones(len(seen.target_B), device=seen.answers[last].device), []
    for depth in early:
        r_B = route[depth].sigmoid()
        if hard:
            r_B = (r_B >= 0.5).float() + r_B - r_B.detach()
        shares.append(left_B * r_B)
        left_B = left_B * (1.0 - r_B)
    return torch.stack([*shares, left_B])


def expert_loss(seen: Seen) -> Tensor:
    """The sum above."""
    settings, first = seen.settings, seen.progress.epoch == 0
    mu, nu, load = (0.0, 1.0, 0.0) if first else (settings[k] for k in ("mu", "nu", "load"))
    share_EB = stop_shares(seen)
    loss_EB = torch.stack([seen.row_losses(answer) for answer in seen.answers.values()])
    depth_E1 = torch.tensor(seen.exits).unsqueeze(1).to(share_EB) / seen.progress.n_layers
    row_B = (share_EB * (loss_EB + mu * depth_E1)).sum(dim=0) + nu * loss_EB.mean(dim=0)
    target = settings["load_target"] or (1.0 / len(share_EB),) * len(share_EB)
    apart = [seen.mean(share_B) - t for share_B, t in zip(share_EB, target, strict=True)]
    return seen.mean(row_B) + load * torch.stack(apart).square().sum()


def _check(model: MultiExitModel, settings: Mapping[str, Any]) -> None:
    target, n_exits = settings["load_target"], len(model.spec.exits)
    if target and (len(target) != n_exits or abs(sum(target) - 1.0) > _ROUNDING):
        raise ConfigError(
            f"loss.load_target: {len(target)} shares for {n_exits} exits, and they must add up to 1"
        )


RECIPE = Recipe(
    name="be3r",
    summary="everything at once: the experts' losses by the routers' chances, and a price on depth",
    source="BE3R",
    stages=(Stage("experts and routers", "all", "all", gradients_of(expert_loss)),),
    defaults={
        "max_tokens": 128,
        "training": {"lr": 2e-5, "batch": 32, "epochs": 4, "keep": "last"},
    },
    settings=(
        Setting("mu", 0.1, "price of depth (as a share of all layers): more leaves earlier"),
        Setting("nu", 0.5, "weight of the experts' mean loss, which keeps each of them trained"),
        Setting("load", 0.0, "weight of the distance from load_target"),
        Setting("load_target", (), "share of rows for each exit, shallowest first; empty: equal", 0.0, 1.0),
        Setting("hard", 0.0, "share of the updates, the last ones, with routes of 0 or 1", 0.0, 1.0),
    ),
    needs=("logits", "route"),
    teaches=("logits", "route"),
    check=_check,
)  # fmt: skip
