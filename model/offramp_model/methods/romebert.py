"""RomeBERT: Robust Training of Multi-Exit BERT.

Geng, Gao, Fu, Zhang. arXiv 2021. https://arxiv.org/abs/2101.09755

The rule: DeeBERT's (see deebert.py), a sample leaves at the first exit whose entropy in nats is below a
threshold S, strictly. What is new is the training: all exits at once, each learning from the final one,
and conflicts between their gradients and the final exit's taken out (offramp_train.recipes.romebert).

Differs from the paper:
1. All that deebert.py lists of the rule and the heads.
2. In training: see the recipe.
Not verified: the numbers of its curves. What crosses, as DeeBERT's, is our own derivation.
"""

from __future__ import annotations

from offramp_model.methods import deebert
from offramp_model.methods.method import Method, Paper

METHOD = Method(
    name="romebert",
    paper=Paper(
        "RomeBERT: Robust Training of Multi-Exit BERT",
        "Geng, Gao, Fu, Zhang",
        "arXiv 2021",
        "https://arxiv.org/abs/2101.09755",
    ),
    rule="Leave at the first exit whose softmax entropy is below a threshold. Nothing is carried.",
    tasks=("classification",),
    policy=deebert.METHOD.policy,
    branches=deebert.METHOD.branches,
    knobs=deebert.METHOD.knobs,
    recipe="romebert",
    use=(
        "DeeBERT's rule where early exits must be good: they are trained with the backbone, in one stage, "
        "and the final exit is shielded from them."
    ),
    avoid=(
        "Where the full model's own answers must stay as they are: the final exit is trained anew with the "
        "others. A training update takes a second backward pass."
    ),
    reported=(
        "Clearly better than DeeBERT at early layers on six GLUE tasks, the last layer about equal (curves "
        "in the official README; numbers not verified)."
    ),
    settings=deebert.METHOD.settings,
)
