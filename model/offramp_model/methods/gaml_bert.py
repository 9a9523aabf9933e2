"""GAML-BERT: Improving BERT Early Exiting by Gradient Aligned Mutual Learning.

Zhu, Wang, Ni, Xie. EMNLP 2021. https://aclanthology.org/2021.emnlp-main.242

The rule: PABEE's (see pabee.py), a sample leaves when t exits in a row agreed with the one before. What is
new is the training: all exits teach each other, as far as that does not pull against the labels
(offramp_train.recipes.gaml_bert).

Differs from the paper:
1. All that pabee.py lists of the rule and the heads; the paper may have a pooler for each exit.
2. The training's constants are ours: see the recipe. No official code is known.
3. The paper can decide by entropy too; that is `--method deebert --recipe gaml_bert`.
Not verified: its heads, patience as its rule, its base models, and all its numbers.
"""

from __future__ import annotations

from offramp_model.methods import pabee
from offramp_model.methods.method import Method, Paper

METHOD = Method(
    name="gaml_bert",
    paper=Paper(
        "GAML-BERT: Improving BERT Early Exiting by Gradient Aligned Mutual Learning",
        "Zhu, Wang, Ni, Xie",
        "EMNLP 2021",
        "https://aclanthology.org/2021.emnlp-main.242",
    ),
    rule=(
        "Leave when the predictions of so many exits in a row agreed with the exit before. "
        "Carried: the count and the last prediction."
    ),
    tasks=("classification",),
    policy=pabee.METHOD.policy,
    branches=pabee.METHOD.branches,
    knobs=pabee.METHOD.knobs,
    recipe="gaml_bert",
    use=(
        "PABEE's rule where shallow exits are weak: they learn from deeper ones, and the labels' gradient "
        "keeps the last word."
    ),
    avoid=(
        "Where training time is short: an update takes a second backward pass. At inference it is PABEE, "
        "with its few operating points."
    ),
    reported=(
        "Significant gains over earlier early-exit methods for BERT on GLUE (abstract; numbers not "
        "verified)."
    ),
    settings=pabee.METHOD.settings,
)
