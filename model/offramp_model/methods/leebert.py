"""LeeBERT: Learned Early Exit for BERT with cross-level optimization.

Zhu. ACL 2021. https://aclanthology.org/2021.acl-long.231

The rule: PABEE's (see pabee.py), a sample leaves when t exits in a row agreed with the one before. What is
new is the training: every exit learns from every other exit, and the weight of each loss is learned from
both halves of the training data (offramp_train.recipes.leebert).

Differs from the paper:
1. All that pabee.py lists of the rule and the heads.
2. The training is a reconstruction: see the recipe. No official code is known.
3. The paper can decide by entropy too; that is `--method deebert --recipe leebert`.
Not verified: patience as its default rule, its base models, its hyper-parameters, and all its numbers. What
crosses, as PABEE's, is our own derivation.
"""

from __future__ import annotations

from offramp_model.methods import pabee
from offramp_model.methods.method import Method, Paper

METHOD = Method(
    name="leebert",
    paper=Paper(
        "LeeBERT: Learned Early Exit for BERT with cross-level optimization",
        "Zhu",
        "ACL 2021",
        "https://aclanthology.org/2021.acl-long.231",
    ),
    rule=(
        "Leave when the predictions of so many exits in a row agreed with the exit before. "
        "Carried: the count and the last prediction."
    ),
    tasks=("classification", "regression"),
    policy=pabee.METHOD.policy,
    branches=pabee.METHOD.branches,
    knobs=pabee.METHOD.knobs,
    recipe="leebert",
    use=(
        "Where nobody knows how much each exit, and each exit's teaching of another, should count: the "
        "training finds the weights itself."
    ),
    avoid=(
        "Where training time is short: an update costs about 1.8 times an ordinary one. At inference it is "
        "PABEE, with its few operating points."
    ),
    reported=(
        "Better than the early-exit methods before it on GLUE (abstract); about 1 point over PABEE at the "
        "same speed-up with ALBERT-base (not verified)."
    ),
    settings=pabee.METHOD.settings,
)
