"""FastBERT: a Self-distilling BERT with Adaptive Inference Time.

Liu, Zhou, Wang, Zhao, Deng, Ju. ACL 2020. https://aclanthology.org/2020.acl-main.537

The rule: at each exit a small classifier of its own, with attention over all tokens, gives a distribution p
with the uncertainty U(p) = H(p) / ln C in [0, 1]. A sample leaves at the first exit whose U is not above the
threshold `speed`; nothing is carried.

Differs from the paper:
1. With first-token pooling attention asks for the first token alone: the answer is the same, at less cost.
2. Setting `pooling = "mean"` averages over real tokens; the official code averages over the wrong axis.
3. A speed may be given for each exit; the paper has one for all.
4. Where the backbone is narrower than 128, so are the classifiers.
5. Confidence is 1 - U, for the planner (no exit depends on it); the paper has none.
Not verified: its speeds of 0.1 and 0.8 and the results there, its twelve data sets, and its count of 46
MFLOPs a classifier. That the hidden states of all tokens must cross (each classifier attends over them) is
our own derivation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec
from offramp_model.exits import Branch, Decision, HeadSpec, Memoryless, State, pool
from offramp_model.methods.deebert import entropy
from offramp_model.methods.method import Method, Paper


def normalised_entropy(logits_BC: Tensor) -> Tensor:
    """U = H(softmax(z)) / ln C, (B,), in [0, 1]; NaN where softmax is."""
    share_B = entropy(logits_BC) / math.log(logits_BC.shape[-1])
    return torch.where(share_B > 1.0, 1.0, share_B)  # a rounding above 1; a NaN stays


class StudentClassifier(Branch):
    """dense W, tanh -> self-attention -> pool -> dense W, tanh -> dense C; the teacher is one as well.

    W width, H heads, S size of a head, Q tokens that ask: the first, or with mean pooling all of them.
    """

    def __init__(self, spec: HeadSpec) -> None:
        """Raises ValueError unless the heads divide the width."""
        super().__init__()
        self.pooling = str(spec.settings.get("pooling", "first"))
        self.heads = int(spec.settings["heads"])
        width = min(int(spec.settings["width"]), spec.width)
        if width < 1 or self.heads < 1 or width % self.heads:
            raise ValueError(f"width {width} and heads {self.heads}: heads must divide the width")
        self.narrow = nn.Linear(spec.width, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.joined = nn.Linear(width, width)
        self.dropout = nn.Dropout(spec.dropout)
        self.dense = nn.Linear(width, width)
        self.classifier = nn.Linear(width, spec.task.answer_width)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        # Padding may hold anything, NaN too: a share of 0 would not take that away.
        real_BTD = torch.where(mask_BT.unsqueeze(-1), hidden_BTD, 0.0)
        narrow_BTW = torch.tanh(self.narrow(real_BTD))
        asking_BQW = narrow_BTW[:, :1] if self.pooling == "first" else narrow_BTW
        attended_BQW = self._attention(asking_BQW, narrow_BTW, mask_BT)
        pooled_BW = pool(attended_BQW, mask_BT, self.pooling)
        return {"logits": self.classifier(torch.tanh(self.dense(pooled_BW)))}

    def _attention(self, asking_BQW: Tensor, narrow_BTW: Tensor, mask_BT: Tensor) -> Tensor:
        # Written out: the exporter takes no attention with a mask, and drops this `where` on the device.
        query_BHQS, key_BHTS, value_BHTS = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in (
                (self.query, asking_BQW),
                (self.key, narrow_BTW),
                (self.value, narrow_BTW),
            )
        )
        score_BHQT = query_BHQS @ key_BHTS.transpose(-1, -2) * query_BHQS.shape[-1] ** -0.5
        score_BHQT = torch.where(mask_BT.unsqueeze(1).unsqueeze(1), score_BHQT, -math.inf)
        share_BHQT = self.dropout(score_BHQT.softmax(dim=-1))
        joined: Tensor = self.joined((share_BHQT @ value_BHTS).transpose(1, 2).flatten(2))
        return joined


@dataclass(frozen=True)
class SpeedPolicy(Memoryless):
    """Leave where the normalised entropy is at most the knob `speed`."""

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        unsure_B = normalised_entropy(outputs["logits"])
        # A NaN compares false: such a row never leaves early.
        leave_B = unsure_B <= knobs["speed"]
        confidence_B = torch.where(unsure_B.isnan(), 0.0, 1.0 - unsure_B)
        return Decision(leave_B, outputs["logits"], confidence_B, {})


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    meaning = "leave where entropy / ln C is at most it: higher is faster; -1 never leaves"
    return (KnobSpec("speed", 0.0, 1.0, never=-1.0, meaning=meaning),)


METHOD = Method(
    name="fastbert",
    paper=Paper(
        "FastBERT: a Self-distilling BERT with Adaptive Inference Time",
        "Liu, Zhou, Wang, Zhao, Deng, Ju",
        "ACL 2020",
        "https://aclanthology.org/2020.acl-main.537",
    ),
    rule=(
        "Leave at the first exit whose entropy, as a share of ln C, is not above `speed`. Nothing is "
        "carried."
    ),
    tasks=("classification",),
    policy=lambda spec: SpeedPolicy(),
    branches=lambda spec: nn.ModuleDict({str(d): StudentClassifier(spec) for d in spec.exits}),
    knobs=_knobs,
    recipe="fastbert",
    use=(
        "Where a fine-tuned model is to keep its answers and exits are added without labels: students "
        "copy the last classifier, and their attention finds what a first layer's first token lacks."
    ),
    avoid=(
        "On short inputs of narrow models, where a classifier with attention of its own is dear beside a "
        "layer; for regression, which has no entropy."
    ),
    reported=(
        "1x to 12x on twelve data sets (abstract). At speed 0.5: Chinese book reviews 86.64 at 5.17 "
        "GFLOPs against 86.88 at 21.79; AG News 93.14 at 2.11 against 94.47 at 21.79 (official README)."
    ),
    settings={"pooling": "first", "width": 128, "heads": 2},
)
