"""Class Means' recipe: plain fine-tuning, for no exit is trained. Gormez, Koyuncu, arXiv 2021. See
offramp_model.methods.class_means; the means are fitted after it (offramp_train.fits.class_means).

Differs from the paper: it takes any trained network; optimisation here is as in DeeBERT's first stage.
"""

from __future__ import annotations

from offramp_train.recipes.recipe import Recipe, Stage, final_loss, gradients_of

RECIPE = Recipe(
    name="class_means",
    summary="plain fine-tuning of the backbone and the final head; early exits learn nothing",
    source="Class Means",
    stages=(Stage("backbone and final head", "backbone+final", "final", gradients_of(final_loss)),),
    defaults={
        "max_tokens": 128,
        "training": {"lr": 2e-5, "batch": 8, "epochs": 3, "keep": "last"},
    },
    # It asks for nothing of early exits, and a method whose exits have weights to learn is refused.
    needs=(),
    teaches=("final",),
)
