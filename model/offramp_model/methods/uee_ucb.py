"""UEE-UCB. Unsupervised Early Exit in DNNs with Multiple Exits.

Hari Narayan N U, Hanawal, Bhardwaj. AIMLSystems 2022. https://arxiv.org/abs/2209.09480

The rule: before a sample runs, a bandit chooses the exit j that is best by P_j + c_1 - c_j + sqrt(alpha
ln(t + 1) / O_j), where P_j is how often exit j disagreed with the first one and c_j its cost; the sample
leaves there. No label is needed: if deeper exits are right whenever shallower ones are, P_j is what exit j
gains in accuracy.

Within the model a sample leaves at the depth that was chosen. The bandit lives on the
device (offramp_edge.bandit); its choice travels as the request's knob, and the cloud reports what its
exits predicted.

Differs from the paper:
1. The chosen exit is the knob `stop`, so calibration on labelled data can choose one too: the best fixed
   exit, which is what the bandit is measured against.
2. The cost of an exit beyond the split may include the upload.
3. Counts may be stale: samples are chosen for while others are in the air, and a sample that a deadline
   stops teaches of the exits it passed. Until every exit has been seen the deepest is chosen.
4. Any number of classes; the paper's task has two.
5. A row that is no number does not leave early, whatever was chosen.
6. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").
7. Confidence is the softmax's largest probability, for the planner (no exit depends on it).
Not verified: that the rule stays valid with stale counts, and upload as a cost, are our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec, StateField
from offramp_model.exits import Decision, HeadSpec, PooledClassifier, State
from offramp_model.methods.method import Method, Paper

_NO_CLASS, _NOT_YET = -1, -2


@dataclass(frozen=True)
class ChosenExitPolicy:
    """Leave at the first exit at depth `stop` or deeper.

    State: first (int16, the class that the first exit predicted), for whoever counts disagreements.
    """

    def state_fields(self, depth: int) -> dict[str, StateField]:
        return {"first": StateField("int16")}

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        none_B = torch.full((mask_BT.shape[0],), _NOT_YET, device=mask_BT.device)
        return {"first": none_B.to(torch.int16)}

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        logits_BC = outputs["logits"]
        sound_B = logits_BC.isfinite().all(dim=-1)
        class_B = torch.where(sound_B, logits_BC.argmax(dim=-1), _NO_CLASS).to(torch.int32)
        first_B = state["first"].to(torch.int32)
        first_B = torch.where(first_B == _NOT_YET, class_B, first_B)
        # Written to be false for a stop that is NaN, too.
        leave_B = sound_B & (knobs["stop"] <= depth)
        confidence_B = torch.softmax(logits_BC, dim=-1).max(dim=-1).values
        confidence_B = torch.where(sound_B, confidence_B, 0.0)
        return Decision(leave_B, logits_BC, confidence_B, {"first": first_B.to(torch.int16)})


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    return nn.ModuleDict({str(depth): PooledClassifier(spec) for depth in spec.exits})


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    n = spec.n_layers
    meaning = "leave at the first exit at this depth or deeper; chosen by the bandit while it runs"
    return (KnobSpec("stop", 1, n, never=n, meaning=meaning, integer=True),)


METHOD = Method(
    name="uee_ucb",
    paper=Paper(
        "Unsupervised Early Exit in DNNs with Multiple Exits",
        "Hari Narayan N U, Hanawal, Bhardwaj",
        "AIMLSystems 2022",
        "https://arxiv.org/abs/2209.09480",
    ),
    rule=(
        "A bandit on the device chooses one exit before a sample runs, by how often each exit disagreed with "
        "the first and what it costs. Carried: the first exit's prediction."
    ),
    tasks=("classification",),
    policy=lambda spec: ChosenExitPolicy(),
    branches=_branches,
    knobs=_knobs,
    recipe="elasticbert",
    use=(
        "In a domain without labels that differs from the training data: it learns by itself which exit is "
        "worth its cost there, and knows before a sample runs whether it will be uploaded."
    ),
    avoid=(
        "Where easy and hard samples are mixed and confidence can be trusted: every sample gets the same "
        "exit. Where exits disagree without the deeper one being right, it overrates depth."
    ),
    reported=(
        "Elastic-BERT from SST-2 to IMDb, exits after layers 1, 3, 7 and 12: errors 38.8, 19.3, 17.1 and "
        "15.4 %; it plays the best exit (layer 3) in about 49,900 of 50,000 rounds (official notebook)."
    ),
    settings={"pooling": "first"},
    online=True,
)
