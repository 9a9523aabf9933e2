"""Past-Future's recipe: all exits at once, and the imitation of later layers. Liao et al., NAACL 2021. See
offramp_model.methods.past_future.

Differs from the paper: where exits stand after some layers only, both losses are of those exits. The defaults
are the official code's for MRPC and RTE; it has lr 1e-5 and 3 epochs for SST-2 and QNLI.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offramp_common.errors import ConfigError
from offramp_model.split_model import MultiExitModel
from offramp_train.recipes.recipe import (
    Progress,
    Recipe,
    Seen,
    Setting,
    Stage,
    depth_weighted,
    gradients_of,
    needs_early_exits,
)


def imitation(seen: Seen) -> Tensor:
    """The mean over early exits i, rows and later layers j of 1 - cos(pooled state j, j imitated from i).

    What is imitated is detached: else both sides could meet in a state that says nothing.
    """
    pooled = {depth: named["pooled"].detach() for depth, named in seen.outputs.items()}
    losses: list[Tensor] = []
    for exit, imitated_BJD in seen.named("imitated").items():
        target_BJD = torch.stack([pooled[depth] for depth in pooled if depth > exit], dim=1)
        cosine_BJ: Tensor = torch.nn.functional.cosine_similarity(target_BJD, imitated_BJD, dim=-1)
        losses.append(seen.mean(1.0 - cosine_BJ.mean(dim=1)))
    return torch.stack(losses).mean()


def past_future(seen: Seen) -> Tensor:
    """The mean of the depth-weighted loss on labels and `imitation`, by the setting `imitation`."""
    share = float(seen.settings["imitation"])
    return (1.0 - share) * depth_weighted(seen) + share * imitation(seen)


def soft_freeze(depth: int, hidden_BTD: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """Layers up to `freeze_layers` learn from an update with probability step / steps, each by itself."""
    low = depth <= progress.settings["freeze_layers"]
    # Torch's generator, which checkpoints keep; drawn for low layers alone.
    if low and torch.rand(()) >= progress.step / progress.steps:
        hidden_BTD = hidden_BTD.detach()
    return hidden_BTD, hidden_BTD


def _check(model: MultiExitModel, settings: Mapping[str, Any]) -> None:
    needs_early_exits(model, settings)
    if settings["freeze_layers"] % 1:
        raise ConfigError(f"loss.freeze_layers = {settings['freeze_layers']}: must be whole")


RECIPE = Recipe(
    name="past_future",
    summary="everything at once, weighted by depth; each exit also learns to imitate the layers after it",
    source="Past-Future",
    stages=(Stage("all exits", "all", "all", gradients_of(past_future), between=soft_freeze),),
    # No warm-up.
    defaults={
        "max_tokens": 128,
        "training": {"lr": 2e-5, "batch": 16, "epochs": 5, "keep": "last"},
    },
    settings=(
        Setting("imitation", 0.5, "share of the imitation in the loss", 0.0, 1.0),
        Setting("freeze_layers", 2.0, "F: so many of the lowest layers learn little at first"),
    ),
    needs=("logits", "imitated"),
    teaches=("logits", "imitated"),
    check=_check,
)
