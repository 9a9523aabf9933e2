"""ElasticBERT. Towards Efficient NLP: A Standard Evaluation and A Strong Baseline.

Liu, Sun, He, Wu, Wu, Zhang, Jiang, Cao, Huang, Qiu. NAACL 2022. https://aclanthology.org/2022.naacl-main.240

The rule: every layer has a pooler and a classifier of its own, trained together with gradients brought into
balance (its recipe). By `rule` a sample leaves as in DeeBERT, where the entropy in nats is below a
threshold, or as in PABEE, when so many exits in a row agreed; PABEE's count and prediction are carried.

Differs from the paper:
1. Its pre-training with an exit after every layer is not done; any backbone is taken as it is. (The paper's
   own weights have a layer design like BERT's.)
2. `rule = "auto"` is entropy for classes and patience for values, which have no entropy.
3. What deebert.py and pabee.py list: rows leave one by one, a value of the knob for each exit,
   `pooling = "mean"`, the planner's confidence.
4. The tolerance is a knob; the released script has a threshold of 0.94 in it for the one regression.
Not verified: pre-training losses and groups of exits, and that both rules do better on ElasticBERT than on
BERT and ALBERT over all tasks of ELUE.
"""

from __future__ import annotations

from offramp_common.spec import KnobSpec
from offramp_model.exits import HeadSpec, Policy
from offramp_model.methods import deebert, pabee
from offramp_model.methods.method import Method, Paper


def _rule(spec: HeadSpec) -> Method:
    """The method whose rule it is. Raises ValueError for a rule there is not."""
    rule, regression = str(spec.settings["rule"]), spec.task.kind == "regression"
    if rule == "auto":
        rule = "patience" if regression else "entropy"
    if rule == "entropy" and regression:
        raise ValueError("rule 'entropy': a number has no entropy; use rule = 'patience'")
    if rule not in ("entropy", "patience"):
        raise ValueError(f"rule {rule!r}: must be auto, entropy or patience")
    return deebert.METHOD if rule == "entropy" else pabee.METHOD


def _policy(spec: HeadSpec) -> Policy:
    return _rule(spec).policy(spec)


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    return _rule(spec).knobs(spec)


METHOD = Method(
    name="elasticbert",
    paper=Paper(
        "Towards Efficient NLP: A Standard Evaluation and A Strong Baseline",
        "Liu, Sun, He, Wu, Wu, Zhang, Jiang, Cao, Huang, Qiu",
        "NAACL 2022",
        "https://aclanthology.org/2022.naacl-main.240",
    ),
    rule=(
        "Leave where the entropy is below a threshold, or when so many exits in a row agreed. Carried: "
        "nothing, or the count and the last prediction."
    ),
    tasks=("classification", "regression"),
    policy=_policy,
    branches=deebert.METHOD.branches,  # a pooler and a classifier for each exit
    knobs=_knobs,
    recipe="elasticbert",
    use=(
        "Where one training is to give exits that are good at every depth: the model may also be cut at "
        "any of them for good."
    ),
    avoid=(
        "Where the last layer must stay as good as alone: all exits train the backbone, and without the "
        "paper's pre-training its strength is not to be had."
    ),
    reported=(
        "GLUE dev average 85.6, cut at 6 of 12 layers 83.3 against BERT-6L 79.2 (the paper's tables by "
        "third-party slides). Rules on top: curves only (not verified)."
    ),
    settings={"pooling": "first", "rule": "auto"},
)
