"""Our own recipe, of the shipped bundle: everything at once, early exits learn from labels and from the
deepest exit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offramp_common.errors import ConfigError
from offramp_model.split_model import MultiExitModel
from offramp_train.recipes.recipe import Recipe, Seen, Setting, Stage, divergence, gradients_of


def self_distilled(seen: Seen) -> Tensor:
    """Weighted mean over exits of (1 - a) L_i + a D(deepest, i); the deepest exit learns from labels alone.

    a is `distil`, D is `divergence`; the deepest exit is detached: it teaches and is not pulled towards its
    pupils.
    """
    share, temperature = seen.settings["distil"], seen.settings["temperature"]
    weights = seen.settings["exit_weights"] or (1.0,) * len(seen.exits)
    losses, answers, last = seen.losses(), seen.answers, seen.exits[-1]
    teacher = answers[last].detach()
    terms = []
    for weight, depth in zip(weights, seen.exits, strict=True):
        loss = losses[depth]
        if depth != last and share > 0:
            apart = seen.mean(divergence(answers[depth], teacher, seen.task, temperature))
            loss = (1 - share) * loss + share * apart
        terms.append(weight * loss)
    return torch.stack(terms).sum() / sum(weights)


def _check(model: MultiExitModel, settings: Mapping[str, Any]) -> None:
    weights, n_exits = settings["exit_weights"], len(model.spec.exits)
    if weights and (len(weights) != n_exits or sum(weights) == 0):
        raise ConfigError(
            f"loss.exit_weights: {len(weights)} weights for {n_exits} exits, and not all of them 0"
        )


RECIPE = Recipe(
    name="self-distilled-joint",
    summary="everything at once, early exits learn from labels and from the deepest exit",
    stages=(Stage("all exits", "all", "all", gradients_of(self_distilled)),),
    defaults={
        "training": {
            "lr": 5e-5, "head_lr": 1e-3, "batch": 32, "epochs": 5, "warmup": 0.06,
            "weight_decay": 0.01, "keep": "best",
        }
    },
    settings=(
        Setting("exit_weights", (), "of the exits, shallowest first; empty: equal"),
        Setting("distil", 0.5, "share of an exit's loss that is its distance from the deepest", 0.0, 1.0),
        Setting("temperature", 2.0, "of both softmaxes in that distance", 1e-3),
    ),
    check=_check,
)  # fmt: skip
