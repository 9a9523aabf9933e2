"""BERxiT: Early Exiting for BERT with Better Fine-Tuning and Extension to Regression.

Xin, Tang, Yu, Lin. EACL 2021. https://aclanthology.org/2021.eacl-main.8

The rule: one small layer, the same at every exit, reads the vector that the exit's classifier reads and
says how likely the exit is wrong; a sample leaves at the first exit where that is below theta, strictly
("learning to exit"). With `rule = "entropy"` the rule is DeeBERT's. Nothing is carried.

Differs from the paper:
1. The paper speaks of certainty and leaves where it is high. As in the official code, what is learned
   and compared is the opposite, "wrong": low leaves.
2. Rows of a batch leave one by one; the official code compares a batch of one with its threshold.
3. Theta may be given for each exit; the official code has such lists too.
4. The vector is read before dropout. In training a version of the official code reads it after.
5. Exits stand on the layers before the last; at the last the ordinary head answers, as in the paper.
   Whether it is wrong is learned and put out there too, and nobody leaves by it.
6. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").
7. A row with a logit that is no finite number never leaves early.
8. Confidence is 1 - wrong, for the planner (no exit depends on it); the paper has none.
Not verified: the paper's result tables, how near the last layer stays to the plain model's, and that its
certainty is one minus the code's number. That hidden states and mask are all that must cross is our own
derivation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec
from offramp_model.exits import Decision, HeadSpec, Memoryless, Policy, PooledClassifier, State
from offramp_model.methods import deebert
from offramp_model.methods.method import Method, Paper


class JudgedClassifier(PooledClassifier):
    """A classifier, and "wrong" (B,): the chance that its answer is wrong, in [0, 1].

    judge   D -> 1, one for all exits
    """

    def __init__(self, spec: HeadSpec, judge: nn.Linear) -> None:
        super().__init__(spec)
        self.judge = judge

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        pooled_BD = self.pooled(hidden_BTD, mask_BT)
        wrong_B = torch.sigmoid(self.judge(pooled_BD)[:, 0])
        return {"logits": self.classifier(self.dropout(pooled_BD)), "wrong": wrong_B}


@dataclass(frozen=True)
class LearnedPolicy(Memoryless):
    """Leave where "wrong" is below the knob `theta`."""

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        answer_BC, wrong_B = outputs["logits"], outputs["wrong"]
        # The judge may be sure where the classifier overflowed: it reads the vector, not the logits.
        leave_B = (wrong_B < knobs["theta"]) & torch.isfinite(answer_BC).all(dim=-1)
        confidence_B = torch.where(wrong_B.isnan(), 0.0, 1.0 - wrong_B)
        return Decision(leave_B, answer_BC, confidence_B, {})


def _learns(settings: Mapping[str, object]) -> bool:
    """Raises ValueError for a rule there is not."""
    rule = settings["rule"]
    if rule not in ("lte", "entropy"):
        raise ValueError(f"rule {rule!r}: must be lte or entropy")
    return rule == "lte"


def _policy(spec: HeadSpec) -> Policy:
    if _learns(spec.settings):
        return LearnedPolicy()
    if spec.task.kind == "regression":
        raise ValueError("rule 'entropy': a number has no entropy; use rule = 'lte'")
    return deebert.EntropyPolicy(len(spec.task.labels))


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    if not _learns(spec.settings):
        return deebert.METHOD.branches(spec)
    judge = nn.Linear(spec.width, 1)
    return nn.ModuleDict({str(depth): JudgedClassifier(spec, judge) for depth in spec.exits})


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    if not _learns(spec.settings):
        return deebert.METHOD.knobs(spec)
    meaning = "theta: leave where the exit's learned chance of being wrong is below it"
    # A little above 1, so that even an exit that is surely wrong can be told to let go.
    return (KnobSpec("theta", 0.0, 1.01, never=0.0, meaning=meaning),)


METHOD = Method(
    name="berxit",
    paper=Paper(
        "BERxiT: Early Exiting for BERT with Better Fine-Tuning and Extension to Regression",
        "Xin, Tang, Yu, Lin",
        "EACL 2021",
        "https://aclanthology.org/2021.eacl-main.8",
    ),
    rule=(
        "Leave at the first exit whose learned chance of being wrong is below a threshold. "
        "Nothing is carried."
    ),
    tasks=("classification", "regression"),
    policy=_policy,
    branches=_branches,
    knobs=_knobs,
    recipe="berxit",
    use=(
        "Regression with a continuous knob and no carried state; or classification where the final "
        "answers must stay near the plain model's while early exits are trained with it."
    ),
    avoid=(
        "Where little training data is left that the model gets wrong: then there is nothing to learn "
        "the chance of being wrong from; check it on dev."
    ),
    reported=(
        "Better trade-offs than two-stage and joint training, and works for regression (abstract); the "
        "numbers of its tables are not verified."
    ),
    settings={"pooling": "first", "rule": "lte"},
    learned=lambda settings: ("logits", "wrong") if _learns(settings) else ("logits",),
)
