"""Class Means (E2CM). Class Means as an Early Exit Decision Mechanism.

Gormez, Koyuncu. arXiv 2021, later E2CM, IJCNN 2022. https://arxiv.org/abs/2103.01148

The rule: no exit is trained. After each layer take the distances from the sample's feature to the mean
feature of each class, each divided by a typical distance, and the softmax of their negatives; a sample
leaves where the largest probability is above a threshold T, strictly. Nothing is carried.

Differs from the paper:
1. The paper's networks see images; on a transformer the feature is the pooled hidden state, so that
   sentences of any length have one of the same size. Setting `pooling` is "first" (the first token) or
   "mean" (of all real tokens); after early layers the first token hardly differs between sentences.
2. Distances are divided by the mean distance over the training rows to the same class mean at the
   same layer; the released code divides by the largest of the sample's own distances.
3. The answer is the class of the largest probability; the released code's is the class whose raw
   distance is least. With a divisor for each class the two can disagree, and one must decide.
4. Thresholds come from calibration on held-out rows; the released code draws random ones.
5. A sample whose distances are no numbers never leaves early. Confidence is the probability.
6. A class without training rows gets the mean of all rows and a divisor so small that it never wins.
Not verified: the paper's divisor (from memory and a summary by others), its numbers; it has none for
transformers. The rule on a transformer, and that nothing but hidden states and mask must cross, are our own
derivation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec
from offramp_model.exits import (
    Branch,
    Decision,
    HeadSpec,
    Memoryless,
    PooledClassifier,
    State,
    confidence_of,
    pool,
)
from offramp_model.methods.method import Method, Paper


class ClassMeans(Branch):
    """Logits are minus the normalised distances to the class means.

    means     (C, D), the mean feature of each class;  scale: (C,), what its distances are divided by
    """

    means: Tensor
    scale: Tensor

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.pooling = str(spec.settings.get("pooling", "first"))
        n_classes = spec.task.answer_width
        # Until they are fitted: points as far apart as normalised features are, so that exits differ.
        self.register_buffer("means", torch.randn(n_classes, spec.width))
        self.register_buffer("scale", torch.ones(n_classes))

    def feature(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, D)."""
        return pool(hidden_BTD, mask_BT, self.pooling)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        distance_BC = distances(self.feature(hidden_BTD, mask_BT), self.means)
        return {"logits": -distance_BC / self.scale}


def distances(feature_BD: Tensor, means_CD: Tensor) -> Tensor:
    """Euclidean, (B, C), as one matrix product.

    |x|^2 - 2 x m + |m|^2 loses its digits where the vectors are long beside their distance (all of a
    layer's features point much the same way), so both are first taken from the middle of the means.
    """
    middle_D = means_CD.mean(dim=0)
    x_BD, m_CD = feature_BD - middle_D, means_CD - middle_D
    square_BC = x_BD.square().sum(-1, keepdim=True) - 2 * (x_BD @ m_CD.T) + m_CD.square().sum(-1)
    return square_BC.clamp(min=0.0).sqrt()


@dataclass(frozen=True)
class NearestMeanPolicy(Memoryless):
    """Leave where the largest probability is above the knob `threshold`."""

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        logits_BC = outputs["logits"]
        largest_B = torch.softmax(logits_BC, dim=-1).amax(dim=-1)
        # NaN compares false, so such a row stays.
        confidence_B = confidence_of(largest_B)
        return Decision(largest_B > knobs["threshold"], logits_BC, confidence_B, {})


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    early = {str(depth): ClassMeans(spec) for depth in spec.exits[:-1]}
    return nn.ModuleDict({**early, str(spec.exits[-1]): PooledClassifier(spec)})


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    meaning = "T: leave where the largest probability is above it; useful ones are just above 1 / C"
    return (KnobSpec("threshold", 0.0, 1.0, never=1.0, meaning=meaning),)


METHOD = Method(
    name="class_means",
    paper=Paper(
        "Class Means as an Early Exit Decision Mechanism",
        "Gormez, Koyuncu",
        "arXiv 2021",
        "https://arxiv.org/abs/2103.01148",
    ),
    rule=(
        "Leave where the softmax of the negative normalised distances to the class means has a "
        "probability above a threshold. No exit head is trained; nothing is carried."
    ),
    tasks=("classification",),
    policy=lambda spec: NearestMeanPolicy(),
    branches=_branches,
    knobs=_knobs,
    recipe="class_means",
    use=(
        "Where a fine-tuned model is there and nothing more can be trained: the means take one pass over "
        "the training rows, and the full model's own answers stay as they are."
    ),
    avoid=(
        "Where exits can be trained: a mean for each class is the weakest of heads. Not for regression, and "
        "with `pooling` first the exits of early layers are near chance."
    ),
    reported=(
        "Higher accuracy than other early-exit schemes at a small training budget, on image networks "
        "(abstract); exact numbers not verified, and none for transformers."
    ),
    settings={"pooling": "first"},
    learned=lambda settings: ("final",),
)
