"""DeeBERT's recipe: two stages. Xin et al., ACL 2020. See offramp_model.methods.deebert.

Differs from the paper: nothing known. (As in the official code the frozen backbone keeps its dropout in
the second stage, and the early exits' losses are summed, not averaged.)
"""

from __future__ import annotations

from offramp_train.recipes.recipe import Recipe, Stage, early_sum, final_loss, gradients_of

RECIPE = Recipe(
    name="deebert",
    summary="the backbone and the final head first; then the early exits on the frozen backbone",
    source="DeeBERT",
    stages=(
        Stage("backbone and final head", "backbone+final", "final", gradients_of(final_loss)),
        Stage("early exits", "early exits", "early", gradients_of(early_sum)),
    ),
    # The official code's: AdamW, linear decay without warm-up, no weight decay, 3 epochs a stage.
    defaults={
        "max_tokens": 128,
        "training": {"lr": 2e-5, "batch": 8, "epochs": 3, "keep": "last"},
    },
)
