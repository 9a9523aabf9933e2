"""One update's work for a recipe, on a toy model and random rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from toy_models import LABELS, SPECIAL, WORDS

from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Batch
from offramp_train.recipe_check import loss_settings
from offramp_train.recipes.recipe import Pass, Progress, Recipe, Seen


def random_batch(seed: int, rows: int = 8) -> Batch:
    """Rows of random words with random labels, for `toy_model`'s vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    ids_BTF = torch.randint(len(SPECIAL), len(SPECIAL) + WORDS, (rows, 10, 1), generator=generator)
    target_B = torch.randint(0, len(LABELS), (rows,), generator=generator)
    return Batch(ids_BTF, torch.ones(rows, 10, dtype=torch.bool), target_B, torch.ones(rows))


def make_pass(
    model: MultiExitModel,
    recipe: Recipe,
    batches: Sequence[Batch],
    *,
    lr: float = 1e-3,
    epoch: int = 0,
    **settings: Any,
) -> Pass:
    """As the training loop makes it. Settings are the recipe's unless given."""
    chosen = loss_settings(recipe, settings, "test")
    extra = None if recipe.extra is None else recipe.extra(model, chosen)
    spec = model.spec
    progress = Progress(0, 10, epoch, spec.n_layers, exits=spec.exits)

    def see(batch: Batch) -> Seen:
        outputs = model(batch.inputs_BTF, batch.mask_BT)
        return Seen(
            outputs,
            spec.exits,
            batch.target_B,
            batch.weight_B,
            spec.task,
            chosen,
            progress,
            extra,
        )

    return Pass(model, extra, see, batches, lr, chosen)
