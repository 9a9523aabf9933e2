"""PABEE's recipe: all exits at once, weighted by depth. Zhou et al., NeurIPS 2020. See
offramp_model.methods.pabee. PCEE-BERT trains in the same way.

Differs from the paper: nothing known. Not verified: its search over learning rates.
"""

from __future__ import annotations

from offramp_train.recipes.recipe import Recipe, Stage, depth_weighted, gradients_of

RECIPE = Recipe(
    name="pabee",
    summary="everything at once, each exit's loss weighted by its depth",
    source="PABEE",
    stages=(Stage("all exits", "all", "all", gradients_of(depth_weighted)),),
    # The official README's: linear schedule, best epoch on dev.
    defaults={
        "max_tokens": 128,
        "training": {"lr": 2e-5, "batch": 32, "epochs": 5, "keep": "best"},
    },
)
