"""The Right Tool for the Job: Matching Model and Instance Complexities.

Schwartz, Stanovsky, Swayamdipta, Dodge, Smith. ACL 2020. https://aclanthology.org/2020.acl-main.593

The rule: a sample leaves at the first exit whose largest probability, calibrated by a temperature of the
exit's own, is at least t. The classifier of exit n reads m_n = sum_j a^(n)_j q_j over all layers j up to it,
q_j being the layer's pooled state and a^(n) a vector of unit length; so all of them are carried.

Differs from the paper:
1. The mixing vectors a^(n) are normalised in the forward pass and trained. In the official code each pass
   makes new parameters of them, so that the optimiser never moves them (our reading).
2. The last exit stands behind the last layer; the paper has four exits and drops the layers above the last.
3. Temperatures are found by bisection in 1/T, in which the loss on dev is convex; the paper's code takes the
   best of several descents (offramp_train.fits.right_tool).
4. A mix never holds the logits of earlier exits (the official code can, and its script does not).
5. Carried are the pooled states, or what they add up to in the mixes still to come where that is smaller;
   the answers are the same. A threshold may be given for each exit.
6. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").

Not verified: the exits after layers 1, 5, 13 and 24 of BERT-large; the results of each data set. What must
cross, in either form, is our own derivation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec, StateField
from offramp_model.exits import (
    Branch,
    Decision,
    HeadSpec,
    State,
    confidence_of,
    nobody_leaves,
    pool,
)
from offramp_model.methods.method import Method, Paper


def carried(exits: tuple[int, ...], depth: int) -> tuple[str, int]:
    """What goes on behind `depth`, and how many vectors of it: "pooled", the states of all layers so far, or
    "sums", the mixes of all exits still to come, as far as they have got. Whichever are fewer."""
    ahead = sum(exit > depth for exit in exits)
    return ("sums", ahead) if ahead < depth else ("pooled", depth)


class Mixing(nn.Module):
    """The vectors a^(n) of all exits, (K exits, L layers): of unit length, and 0 above the exit."""

    below_KL: Tensor

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(spec.exits), spec.n_layers))
        depths_K1 = torch.tensor(spec.exits).unsqueeze(1)
        below_KL = torch.arange(spec.n_layers) < depths_K1
        self.register_buffer("below_KL", below_KL, persistent=False)

    def forward(self) -> Tensor:
        return nn.functional.normalize(self.weight * self.below_KL, dim=1)


class MixedClassifier(Branch):
    """A layer's pooled state and, at an exit, the classifier of the mix. K are the exits not passed yet."""

    def __init__(self, spec: HeadSpec, depth: int, pooler: nn.Linear, mixing: Mixing) -> None:
        super().__init__()
        self.pooling = str(spec.settings.get("pooling", "first"))
        self.depth, self.exits = depth, spec.exits
        self.pooler, self.mixing = pooler, mixing
        self.dropout = nn.Dropout(spec.dropout)
        if depth in spec.exits:
            self.classifier = nn.Linear(spec.width, spec.task.answer_width)
            self.register_buffer("temperature", torch.ones(()))  # 1 until it is fitted

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        pooled_BD = torch.tanh(self.pooler(pool(hidden_BTD, mask_BT, self.pooling)))
        new_B1D = self.dropout(pooled_BD).unsqueeze(1)
        passed = sum(exit < self.depth for exit in self.exits)
        weights_KL = self.mixing()[passed:, : self.depth]
        outputs: dict[str, Tensor] = {}
        if "sums" in state:
            mixed_BKD = state["sums"] + weights_KL[:, -1:] * new_B1D
        else:
            pooled_BLD = torch.cat([state["pooled"], new_B1D], dim=1) if state else new_B1D
            mixed_BKD = weights_KL @ pooled_BLD
        name, size = carried(self.exits, self.depth)
        if name == "pooled":
            outputs["pooled"] = pooled_BLD
        elif size:
            outputs["sums"] = mixed_BKD[:, -size:]
        if self.depth in self.exits:
            outputs["logits"] = self.classifier(mixed_BKD[:, 0]) / self.temperature
        return outputs


@dataclass(frozen=True)
class CalibratedPolicy:
    """Leave where the largest probability reaches the knob `threshold`. State: see `carried`; the branch
    makes it."""

    exits: tuple[int, ...]
    width: int
    n_classes: int

    def state_fields(self, depth: int) -> dict[str, StateField]:
        name, size = carried(self.exits, depth)
        return {name: StateField("float32", (size, self.width))} if size else {}

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        return {}

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        new = {name: outputs[name] for name in self.state_fields(depth)}
        if "logits" not in outputs:
            return nobody_leaves(self.n_classes, new)
        largest_B = torch.softmax(outputs["logits"], dim=-1).amax(dim=-1)
        # A NaN compares false: such a row never leaves early.
        confidence_B = confidence_of(largest_B)
        return Decision(largest_B >= knobs["threshold"], outputs["logits"], confidence_B, new)


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    pooler, mixing = nn.Linear(spec.width, spec.width), Mixing(spec)
    depths = range(1, spec.n_layers + 1)
    return nn.ModuleDict({str(d): MixedClassifier(spec, d, pooler, mixing) for d in depths})


METHOD = Method(
    name="right_tool",
    paper=Paper(
        "The Right Tool for the Job: Matching Model and Instance Complexities",
        "Schwartz, Stanovsky, Swayamdipta, Dodge, Smith",
        "ACL 2020",
        "https://aclanthology.org/2020.acl-main.593",
    ),
    rule=(
        "Leave at the first exit whose largest calibrated probability reaches a threshold. Carried: the "
        "pooled states of all layers, or their sums in the mixes still to come."
    ),
    tasks=("classification",),
    policy=lambda spec: CalibratedPolicy(spec.exits, spec.width, len(spec.task.labels)),
    branches=_branches,
    # No probability reaches 2, not even one that rounds to 1.
    knobs=lambda spec: (
        KnobSpec(
            "threshold", 0.0, 1.0, never=2.0, meaning="t: leave where the surest class has it"
        ),
    ),
    recipe="right_tool",
    use=(
        "Where a threshold should mean something: at every exit the confidence is a calibrated "
        "probability of being right."
    ),
    avoid=(
        "Where what crosses must be small: up to half as many vectors as there are layers go along with "
        "the hidden states."
    ),
    reported=(
        "Up to five times faster than the full model at the same accuracy on five data sets (abstract); "
        "numbers of each set not verified."
    ),
    settings={"pooling": "first"},
    every_layer=True,
)
