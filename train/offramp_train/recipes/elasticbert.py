"""ElasticBERT's fine-tuning: a plain sum of losses, and gradients in balance. Liu et al., NAACL 2022. See
offramp_model.methods.elasticbert.

Differs from the paper:
1. No pre-training; gradient equilibrium, which it uses there too, is for fine-tuning.
2. Where exits stand after some layers only, exits are counted in place of layers; the paper has one after
   each.
Not verified: which epoch it keeps when exits are trained together. Here it is the best on dev.
"""

from __future__ import annotations

from torch import Tensor

from offramp_train.recipes.recipe import Progress, Recipe, Stage, gradients_of, plain_sum


def equilibrium(depth: int, hidden_BTD: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """Gradients in balance: at the output of a layer, the mean over the exits from there on of their losses'
    gradients.

    What comes from the next layer is such a mean already, so it counts for as many exits as are behind it.
    """
    here = sum(exit >= depth for exit in progress.exits)
    behind = sum(exit > depth for exit in progress.exits)
    read_BTD = _scaled(hidden_BTD, 1 / here)
    # Behind the last exit nothing is read: a factor of 0 would say nothing.
    return read_BTD, _scaled(read_BTD, behind) if behind else read_BTD


def _scaled(hidden_BTD: Tensor, factor: float) -> Tensor:
    """The same values; the gradient that comes back is times `factor`."""
    out_BTD = hidden_BTD.view_as(hidden_BTD)  # a place of its own in the graph, for the hook
    if out_BTD.requires_grad:
        out_BTD.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient_BTD: gradient_BTD * factor
        )
    return out_BTD


RECIPE = Recipe(
    name="elasticbert",
    summary="everything at once, losses added up, each layer's gradient the mean of those above it",
    source="ElasticBERT",
    stages=(Stage("all exits", "all", "all", gradients_of(plain_sum), between=equilibrium),),
    # The official script's (MRPC).
    defaults={
        "max_tokens": 128,
        "training": {
            "lr": 2e-5, "batch": 32, "epochs": 5, "warmup": 0.06, "weight_decay": 0.1,
            "keep": "best",
        },
    },
)  # fmt: skip
