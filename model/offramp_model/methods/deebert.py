"""DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference.

Xin, Tang, Lee, Yu, Lin. ACL 2020. https://aclanthology.org/2020.acl-main.204

The rule: at each exit take the entropy (in nats) of the exit head's softmax; a sample leaves at the
first exit whose entropy is below a threshold S, strictly. Nothing is carried from exit to exit.

Differs from the paper:
1. Rows of a batch leave one by one; the published rule stops on a batch of one.
2. A threshold may be given for each exit (the paper's code can, its experiments use one for all).
3. The final layer's head is the ordinary pooler and classifier, as in the paper; the official code
   also builds an off-ramp there and leaves it untrained, which we do not.
4. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").
5. Entropy is computed by log_softmax; the official sum(p * log p) is NaN for saturated logits,
   which then never leave.
6. Confidence is 1 - H / ln C, for the planner (no exit depends on it); the paper has none.
Not verified: its results for each data set. That hidden states and mask are all that must cross is our own
derivation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec
from offramp_model.exits import (
    Decision,
    HeadSpec,
    Memoryless,
    PooledClassifier,
    State,
    confidence_of,
)
from offramp_model.methods.method import Method, Paper

_LEAST_LOG_P = -1e4


def entropy(logits_BC: Tensor) -> Tensor:
    """H(softmax(z)) in nats, (B,), at least 0; exactly 0 for saturated logits.

    NaN where softmax is: a logit is NaN or +inf, or all are -inf.
    """
    log_p_BC = torch.log_softmax(logits_BC, dim=-1)
    # p log p -> 0 as p -> 0, where log p may be -inf: below the bound p is 0 in float32 anyway.
    return -(log_p_BC.exp() * log_p_BC.clamp(min=_LEAST_LOG_P)).sum(dim=-1)


@dataclass(frozen=True)
class EntropyPolicy(Memoryless):
    """Leave where the entropy is below the knob `threshold`."""

    n_classes: int

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        logits_BC = outputs["logits"]
        entropy_B = entropy(logits_BC)
        # A NaN entropy compares false: such a row never leaves early.
        confidence_B = confidence_of(1.0 - entropy_B / math.log(self.n_classes))
        return Decision(entropy_B < knobs["threshold"], logits_BC, confidence_B, {})


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    return nn.ModuleDict({str(depth): PooledClassifier(spec) for depth in spec.exits})


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    high = math.log(len(spec.task.labels))
    meaning = "S: leave where the entropy in nats is below it"
    # A little above ln C, so that even uniform logits can be told to leave.
    return (KnobSpec("threshold", 0.0, high * 1.01, never=0.0, meaning=meaning),)


METHOD = Method(
    name="deebert",
    paper=Paper(
        "DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference",
        "Xin, Tang, Lee, Yu, Lin",
        "ACL 2020",
        "https://aclanthology.org/2020.acl-main.204",
    ),
    rule="Leave at the first exit whose softmax entropy is below a threshold. Nothing is carried.",
    tasks=("classification",),
    policy=lambda spec: EntropyPolicy(len(spec.task.labels)),
    branches=_branches,
    knobs=_knobs,
    recipe="deebert",
    use=(
        "The baseline: the full model's own answers stay as they are, and one threshold moves speed "
        "against quality. Exits can be added to a model that is already fine-tuned."
    ),
    avoid=(
        "Where the backbone was not trained to say anything in its first layers: exits on frozen layers "
        "cannot make up for that, and joint training does better."
    ),
    reported=(
        "About 40 % of inference time saved with little loss (abstract). BERT-base on SST-2 -0.2 points "
        "at -21 % time, -0.6 at -40 % (not verified)."
    ),
    settings={"pooling": "first"},
)
