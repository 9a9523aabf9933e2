"""What a forward pass showed, made up: for tests of recipes' losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp_common.spec import TaskSpec
from offramp_train.recipe_check import loss_settings
from offramp_train.recipes.recipe import Progress, Recipe, Seen

CLASSES = TaskSpec("classification", ("a", "b", "c"))
VALUES = TaskSpec("regression")


def seen(
    outputs: Mapping[int, Tensor | Mapping[str, Tensor]],
    target_B: Tensor,
    recipe: Recipe | None = None,
    *,
    task: TaskSpec = CLASSES,
    weight_B: Tensor | None = None,
    step: int = 0,
    steps: int = 10,
    epoch: int = 0,
    extra: nn.Module | None = None,
    **settings: Any,
) -> Seen:
    """`outputs`: depth -> logits, or all of the branch's outputs. Settings are the recipe's unless given."""
    named = {d: {"logits": v} if isinstance(v, Tensor) else dict(v) for d, v in outputs.items()}
    exits = tuple(sorted(named))
    return Seen(
        named,
        exits,
        target_B,
        torch.ones(len(target_B)) if weight_B is None else weight_B,
        task,
        {} if recipe is None else loss_settings(recipe, settings, "test"),
        Progress(step, steps, epoch, exits[-1], exits=exits),
        extra,
    )
