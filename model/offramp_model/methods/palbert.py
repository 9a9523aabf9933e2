"""PALBERT: Teaching ALBERT to Ponder.

Balagansky, Gavrilov. NeurIPS 2022. https://arxiv.org/abs/2204.03276

The rule: exit n gives a chance to stop, lambda_n. The chance to have stopped by exit n is 1 - s_n, with
s_n = s_(n-1) (1 - lambda_n) and s_0 = 1. A sample leaves at the first exit where that is above q, strictly,
with that exit's own answer (the Q-exit).

Differs from the paper:
1. Pooler, classifier and lambda head are shared by all exits, as in the official code, on any backbone; the
   paper's ALBERT shares its layers too, which is the backbone's to decide.
2. The pooled vector u_n crosses a cut beside s_n: the next lambda head reads it, and it is not found in the
   hidden state that the next exit sees. (It could be computed again from the hidden state at the cut.)
3. Where exits stand after some layers only, n counts exits; the vector before the first is 0.
4. q may be given for each exit. q = 1 never leaves.
5. The stochastic exit of PonderNet, and the code's other lambda heads, are not offered.
6. A row with a number that is not finite in an exit's outputs never leaves early, there or later.
7. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").
8. Confidence is 1 - s_n, for the planner; the paper has none.
Not verified: the paper's averages, and a third party's 1.5x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec, StateField
from offramp_model.exits import Decision, HeadSpec, PooledClassifier, State
from offramp_model.methods.method import Method, Paper

_LAMBDA_BLOCKS = 3


class PonderingHead(PooledClassifier):
    """logits (B, C); stop (B,): the logit of lambda; u (B, D): the pooled vector, which the next exit reads.

    stop   reads this exit's vector, then the one of the exit before
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        both = 2 * spec.width
        blocks: list[nn.Module] = []
        for _ in range(_LAMBDA_BLOCKS):
            blocks += [nn.Linear(both, both), nn.Tanh()]
        self.stop = nn.Sequential(*blocks, nn.Linear(both, 1))

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        u_BD = self.pooled(hidden_BTD, mask_BT)
        both_BE = self.dropout(torch.cat([u_BD, state["u"]], dim=-1))
        return {
            "logits": self.classifier(self.dropout(u_BD)),
            "stop": self.stop(both_BE)[:, 0],
            "u": u_BD,
        }


@dataclass(frozen=True)
class QExitPolicy:
    """Leave where the chance to have stopped is above the knob `q`. State: s and u, float32.

    width   of u, D
    """

    width: int

    def state_fields(self, depth: int) -> dict[str, StateField]:
        return {"s": StateField("float32"), "u": StateField("float32", (self.width,))}

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        s_B = torch.ones(mask_BT.shape[0], device=mask_BT.device)
        return {"s": s_B, "u": torch.zeros_like(s_B).unsqueeze(1).expand(-1, self.width)}

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        logits_BC, stop_B = outputs["logits"], outputs["stop"]
        sound_B = torch.isfinite(logits_BC).all(dim=-1) & torch.isfinite(stop_B)
        # 1 - lambda without rounding to 0 too soon. A NaN stays in s for good, and compares false.
        s_B = torch.where(sound_B, state["s"] * torch.sigmoid(-stop_B), float("nan"))
        stopped_B = 1.0 - s_B
        confidence_B = torch.where(stopped_B.isnan(), 0.0, stopped_B)
        return Decision(
            stopped_B > knobs["q"], logits_BC, confidence_B, {"s": s_B, "u": outputs["u"]}
        )


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    head = PonderingHead(spec)  # one for all exits
    return nn.ModuleDict({str(depth): head for depth in spec.exits})


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    meaning = "leave where the chance to have stopped by then is above it (the paper: 0.5)"
    return (KnobSpec("q", 0.0, 1.0, never=1.0, meaning=meaning),)


METHOD = Method(
    name="palbert",
    paper=Paper(
        "PALBERT: Teaching ALBERT to Ponder",
        "Balagansky, Gavrilov",
        "NeurIPS 2022",
        "https://arxiv.org/abs/2204.03276",
    ),
    rule=(
        "Each exit gives a chance to stop there; leave at the first where the chance to have stopped by then "
        "is above q. Carried: the chance left, and the last pooled vector."
    ),
    tasks=("classification", "regression"),
    policy=lambda spec: QExitPolicy(spec.width),
    branches=_branches,
    knobs=_knobs,
    recipe="palbert",
    use=(
        "On ALBERT, whose layers are one: the depth is learned with a prior that says how deep it should be, "
        "and all exits together cost the weights of one."
    ),
    avoid=(
        "Where the wire is narrow or heads must be cheap: a vector as wide as the model crosses with each "
        "sample, and the lambda head has three matrices of twice that width."
    ),
    reported=(
        "Better than PonderNet and than PABEE on most GLUE tasks with the same backbones (abstract); speed "
        "not verified."
    ),
    settings={"pooling": "first"},
    learned=lambda settings: ("logits", "stop"),
)
