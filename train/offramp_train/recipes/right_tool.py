"""The Right Tool's recipe: all exits at once, equal weights. Schwartz et al., ACL 2020. See
offramp_model.methods.right_tool; its temperatures are fitted after (offramp_train.fits.right_tool).

Differs from the paper:
1. One run at the middle of its three learning rates; the paper takes the best of a random search on dev.
2. AdamW without weight decay, with a linear decay of the rate, where the paper has Adam.
3. The official code's variant that trains one exit an update, drawn at random, is not here (off by default
   there).
"""

from __future__ import annotations

from offramp_train.recipes.recipe import Recipe, Stage, gradients_of, plain_sum

RECIPE = Recipe(
    name="right_tool",
    summary="everything at once, the sum of all exits' losses",
    source="The Right Tool for the Job",
    stages=(Stage("all exits", "all", "all", gradients_of(plain_sum)),),
    # The official code's.
    defaults={
        "max_tokens": 512,
        "training": {"lr": 3e-5, "batch": 72, "epochs": 2, "keep": "best"},
    },
)
