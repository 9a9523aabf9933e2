"""DACT-BERT: Differentiable Adaptive Computation Time for an Efficient BERT Inference.

Eyzaguirre, del Rio, Araujo, Soto. NLP-Power workshop at ACL 2022.
https://aclanthology.org/2022.nlppower-1.10

The rule: exit n gives class probabilities y_n and a share h_n in (0, 1). The answer is a running mixture,
a_n = p_(n-1) y_n + (1 - p_(n-1)) a_(n-1) with p_n = p_(n-1) h_n, a_0 = 0 and p_0 = 1. A sample leaves when
the d exits still to come cannot change its top class c for the second r any more:
a_n[c] (1 - p_n)^d >= a_n[r] + p_n d.

Differs from the paper:
1. Setting `bound = "tight"` compares with 1 - (1 - a_n[r]) (1 - p_n)^d, which leaves earlier and is as safe:
   it is the most that class r can reach ("plain" is the paper's, above).
2. The knob `slack` is a factor g on d in the bound. 1 is the paper's rule; with less the answer may be
   another than at full depth; above 1 there is only "never leave". It may be given for each exit.
3. Where exits stand after some layers only, d counts exits, not layers.
4. Regression, which the paper does not have: the answer is a running mean of values by the same weights,
   and a sample leaves when 1 - (1 - p_n)^d is below `tolerance`, strictly. That is how far the answer can
   still move, as a share of the range in which the exits' values lie, so no range need be known; values
   outside it void the bound.
5. The answer given out is log(a_n + 1e-12), whose softmax is a_n.
6. A row with a number that is not finite in an exit's outputs never leaves early, there or later.
7. h_n starts near 0.88 (a bias of 2), so that deep exits have a gradient from the start.
8. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").
9. Confidence is the least share that the top class can end with, a_n[c] (1 - p_n)^(g d), for regression
   (1 - p_n)^d, for the planner (no exit depends on it); the paper has none.
Not verified: its base models; that the paper's heads and shares are one of each per layer without a pooler;
its rule for leaving (the bound as such holds); and all its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec, StateField
from offramp_model.exits import Branch, Decision, HeadSpec, State, confidence_of, pool
from offramp_model.methods.method import Method, Paper

_START_BIAS = 2.0
_LEAST_SHARE = 1e-12


class HaltingHead(Branch):
    """logits (B, C), and go_on (B,): the logit of h, how much what comes may still say."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.pooling = str(spec.settings["pooling"])
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(spec.width, spec.task.answer_width)
        self.go_on = nn.Linear(spec.width, 1)
        nn.init.normal_(self.go_on.weight, 0.0, 0.02)
        nn.init.constant_(self.go_on.bias, _START_BIAS)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        pooled_BD = self.dropout(pool(hidden_BTD, mask_BT, self.pooling))
        return {"logits": self.classifier(pooled_BD), "go_on": self.go_on(pooled_BD)[:, 0]}


@dataclass(frozen=True)
class MixturePolicy:
    """Leave when later exits cannot change the running mixture enough. State: a and p, float32.

    exits        depths with an exit;  width: of a, C
    regression   a is a value, and the knob is `tolerance` rather than `slack`
    tight        the tight upper bound of the second class
    """

    exits: tuple[int, ...]
    width: int
    regression: bool
    tight: bool = False

    def state_fields(self, depth: int) -> dict[str, StateField]:
        return {"a": StateField("float32", (self.width,)), "p": StateField("float32")}

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        p_B = torch.ones(mask_BT.shape[0], device=mask_BT.device)
        return {"a": torch.zeros_like(p_B).unsqueeze(1).expand(-1, self.width), "p": p_B}

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        logits_BC, go_on_B = outputs["logits"], outputs["go_on"]
        sound_B = torch.isfinite(logits_BC).all(dim=-1) & torch.isfinite(go_on_B)
        y_BC = logits_BC if self.regression else torch.softmax(logits_BC, dim=-1)
        # A NaN stays in a for good, and compares false.
        y_BC = torch.where(sound_B.unsqueeze(1), y_BC, float("nan"))
        before_B1 = state["p"].unsqueeze(1)
        a_BC = before_B1 * y_BC + (1.0 - before_B1) * state["a"]
        p_B = state["p"] * torch.sigmoid(go_on_B)
        left = sum(exit > depth for exit in self.exits)  # d
        if self.regression:
            kept_B = (1.0 - p_B) ** left + 0.0 * a_BC[:, 0]
            leave_B, answer_BC, sure_B = 1.0 - kept_B < knobs["tolerance"], a_BC, kept_B
        else:
            leave_B, sure_B = self._settled(a_BC, p_B, knobs["slack"], left)
            answer_BC = torch.log(a_BC + _LEAST_SHARE)
        confidence_B = confidence_of(sure_B)
        return Decision(leave_B, answer_BC, confidence_B, {"a": a_BC, "p": p_B})

    def _settled(
        self, a_BC: Tensor, p_B: Tensor, slack: Tensor, left: int
    ) -> tuple[Tensor, Tensor]:
        """(whether no other class can overtake the top one, the least share that one can end with)."""
        first_B, second_B = torch.topk(a_BC, 2, dim=-1).values.unbind(dim=-1)
        steps = slack * left
        kept_B = torch.pow(1.0 - p_B, steps)
        most_B = 1.0 - (1.0 - second_B) * kept_B if self.tight else second_B + p_B * steps
        return (first_B * kept_B >= most_B) & (slack <= 1.0), first_B * kept_B


def _policy(spec: HeadSpec) -> MixturePolicy:
    bound = spec.settings["bound"]
    if bound not in ("plain", "tight"):
        raise ValueError(f"bound {bound!r}: must be plain or tight")
    regression, width = spec.task.kind == "regression", spec.task.answer_width
    return MixturePolicy(spec.exits, width, regression, bound == "tight")


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    if spec.task.kind == "regression":
        meaning = "leave where the answer can move by less than this share of the values' range"
        # A little above 1, so that p = 1 can be told to leave too.
        return (KnobSpec("tolerance", 0.0, 1.01, never=0.0, meaning=meaning),)
    meaning = (
        "g: factor on the exits to come in the bound; 1 never changes a class, less leaves earlier"
    )
    return (KnobSpec("slack", 0.0, 1.0, never=2.0, meaning=meaning),)


METHOD = Method(
    name="dact_bert",
    paper=Paper(
        "DACT-BERT: Differentiable Adaptive Computation Time for an Efficient BERT Inference",
        "Eyzaguirre, del Rio, Araujo, Soto",
        "NLP-Power workshop at ACL 2022",
        "https://aclanthology.org/2022.nlppower-1.10",
    ),
    rule=(
        "The answer is a running mixture of all exits' probabilities; leave when the exits to come have too "
        "little weight left to change its top class. Carried: the mixture and the weight left."
    ),
    tasks=("classification", "regression"),
    policy=_policy,
    branches=lambda spec: nn.ModuleDict({str(depth): HaltingHead(spec) for depth in spec.exits}),
    knobs=_knobs,
    recipe="dact_bert",
    use=(
        "Where leaving early must not change the class that full depth would give: at slack 1 that is "
        "certain, and training (loss.tau) decides how early it comes."
    ),
    avoid=(
        "Where one trained model must serve many operating points: speed is chosen in training, one model "
        "for each tau."
    ),
    reported=(
        "Better than DeeBERT and PABEE at low compute and competitive elsewhere (abstract); its numbers are "
        "not verified."
    ),
    settings={"pooling": "first", "bound": "plain"},
    learned=lambda settings: ("logits", "go_on"),
)
