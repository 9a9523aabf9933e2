"""PABEE. BERT Loses Patience: Fast and Robust Inference with Early Exit.

Zhou, Xu, Ge, McAuley, Xu, Wei. NeurIPS 2020. https://arxiv.org/abs/2006.04152

The rule: count how many exits in a row predicted the same class as the exit before (regression: a
value less than tau from it); a disagreement sets the count to 0. A sample leaves when the count
reaches the patience t, so at exit t + 1 at the earliest.

Differs from the paper:
1. Counters are kept per row; the official code makes the whole batch agree (torch.all).
2. "Never leave" is patience = number of layers; the official code's special case patience 0 (run
   the full model) is not offered.
3. Patience and tau may be given for each exit: a row leaves where its count has reached that exit's
   patience. With one value for all this is the paper's rule. Where exits stand after some layers
   only, it is exits that are counted.
4. A row with a NaN among its logits predicts no class and agrees with nothing; counts stop at the number
   of layers, and at 255.
5. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").
6. Confidence is the count as a share of all layers, for the planner (no exit depends on it); the
   paper has none.
Not verified: the paper's best patience of 6 for ALBERT-base, its learning-rate search, and its theorem on
when patience helps. That count and last prediction must cross is our own derivation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec, StateField
from offramp_model.exits import Decision, HeadSpec, PooledClassifier, State
from offramp_model.methods.method import Method, Paper

_NO_CLASS = -1
_MAX_COUNT = 255


@dataclass(frozen=True)
class PatiencePolicy:
    """Leave when `patience` exits in a row agreed with the one before.

    State: count (uint8, the agreements so far) and previous (the last prediction: int16 class index or
    float32 value).

    n_layers     scales the confidence
    regression   compare values within the knob `tolerance` (tau) rather than classes
    """

    n_layers: int
    regression: bool

    def state_fields(self, depth: int) -> dict[str, StateField]:
        previous = StateField("float32" if self.regression else "int16")
        return {"count": StateField("uint8"), "previous": previous}

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        # Neither a class -1 nor a NaN ever agrees with anything.
        none = torch.full((mask_BT.shape[0],), float("nan"), device=mask_BT.device)
        return {
            "count": torch.zeros_like(none, dtype=torch.uint8),
            "previous": none
            if self.regression
            else torch.full_like(none, _NO_CLASS, dtype=torch.int16),
        }

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        logits_BC = outputs["logits"]
        prediction_B: Tensor
        if self.regression:
            prediction_B = logits_BC[:, 0]
            agree_B = (prediction_B - state["previous"]).abs() < knobs["tolerance"]
        else:
            # A row with a NaN predicts no class, so it cannot agree its way out.
            broken_B = logits_BC.isnan().any(dim=-1)
            prediction_B = torch.where(broken_B, _NO_CLASS, logits_BC.argmax(dim=-1))
            agree_B = (prediction_B == state["previous"].to(prediction_B.dtype)) & ~broken_B
            prediction_B = prediction_B.to(torch.int16)
        # No more exits than layers can agree: whatever a frame claims, the confidence stays below 1.
        most = min(self.n_layers, _MAX_COUNT)
        longer_B = (state["count"].to(torch.float32) + 1).clamp(max=most)
        count_B = torch.where(agree_B, longer_B, 0.0)
        leave_B = count_B >= knobs["patience"]
        state = {"count": count_B.to(torch.uint8), "previous": prediction_B}
        return Decision(leave_B, logits_BC, count_B / self.n_layers, state)


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    pooler = nn.Linear(spec.width, spec.width)  # one for all exits, as the paper's code has it
    return nn.ModuleDict({str(depth): PooledClassifier(spec, pooler) for depth in spec.exits})


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    n = spec.n_layers
    meaning = "t: leave when so many exits in a row agreed with the one before"
    patience = KnobSpec("patience", 1, n, never=n, meaning=meaning, integer=True)
    if spec.task.kind == "classification":
        return (patience,)
    # tau = 0 never agrees, whatever the patience.
    meaning = "tau: values closer than this agree (the paper's code suggests 0.1)"
    return (patience, KnobSpec("tolerance", 0.0, 1e9, never=0.0, meaning=meaning))


METHOD = Method(
    name="pabee",
    paper=Paper(
        "BERT Loses Patience: Fast and Robust Inference with Early Exit",
        "Zhou, Xu, Ge, McAuley, Xu, Wei",
        "NeurIPS 2020",
        "https://arxiv.org/abs/2006.04152",
    ),
    rule=(
        "Leave when the predictions of so many exits in a row agreed with the exit before. "
        "Carried: the count and the last prediction."
    ),
    tasks=("classification", "regression"),
    policy=lambda spec: PatiencePolicy(spec.n_layers, spec.task.kind == "regression"),
    branches=_branches,
    knobs=_knobs,
    recipe="pabee",
    use=(
        "Where confidence cannot be trusted or does not exist, as in regression: agreement needs no "
        "calibrated probabilities."
    ),
    avoid=(
        "In shallow models: the patience is a whole number and costs as many layers, so there are few "
        "operating points and none before layer 2."
    ),
    reported=(
        "ALBERT-base 1.57x faster with higher scores (RTE 78.6 to 80.1, SST-2 92.8 to 93.0); BERT-base "
        "1.62x, MNLI 84.5 to 83.6 (official README)."
    ),
    settings={"pooling": "first"},
)
