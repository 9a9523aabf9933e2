"""Early Exiting with Ensemble Internal Classifiers.

Sun, Zhou, Liu, Zhang, Jiang, Cao, Huang, Qiu. arXiv 2021. https://arxiv.org/abs/2105.13792

The rule: every exit votes for its most probable class; a sample leaves at exit i when the most votes that
a class has, divided by i^lambda, have reached tau, and gets the class that was voted for. With lambda = 0
that is a number of votes, patience that need not be without a break.

With tau at "never" the answer is the majority of all exits' votes, not the last classifier's. This is the
method's design: the full model's answers are those of an ensemble.

Differs from the paper:
1. Of classes with as many votes, the one that is more probable at this exit wins. The sheet's "predicted
   latest" would need to be carried.
2. The answer is ln((votes + p / 2) / sum), p being this exit's probabilities: half a vote, too little to
   turn a majority around, which breaks ties and keeps the answer finite. Softmax gives the share of votes.
3. Votes are counted per row, and i is the number of exits, where they stand after some layers only.
4. Tau may be given for each exit.
5. A row with a logit that is no finite number votes for nothing there and does not leave there; votes of
   earlier exits stay. Counts stop at 255.
6. `votes = "soft"` adds up probabilities instead. Ours: the paper has votes.
7. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").
8. Confidence is the most votes as a share of all exits, for the planner (no exit depends on it).
Not verified: the vote's formula (from memory), a good lambda, its base models, and all results; no official
code is known. That the votes are all that must cross is our own derivation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec, StateField
from offramp_model.exits import Decision, HeadSpec, PooledClassifier, State
from offramp_model.methods.method import Method, Paper

_MAX_COUNT = 255
_TIE_BREAK = 0.5  # of a vote: below 1, and far above what is lost to rounding
_LEAST_SHARE = 1e-6  # keeps the logarithm finite; runtimes differ in what they make of denormals


@dataclass(frozen=True)
class VotePolicy:
    """Leave where the most votes, over i^exponent, are at least the knob `tau`.

    State: votes (C,), uint8, or float32 where `soft`.

    exits      depths with an exit: i is how many of them a row has seen
    exponent   lambda, at least 0 and below 1
    """

    n_classes: int
    exits: tuple[int, ...]
    exponent: float
    soft: bool

    def state_fields(self, depth: int) -> dict[str, StateField]:
        return {"votes": StateField("float32" if self.soft else "uint8", (self.n_classes,))}

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        dtype = torch.float32 if self.soft else torch.uint8
        shape = (mask_BT.shape[0], self.n_classes)
        return {"votes": torch.zeros(shape, dtype=dtype, device=mask_BT.device)}

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        logits_BC = outputs["logits"]
        sound_B1 = torch.isfinite(logits_BC).all(dim=-1, keepdim=True)
        p_BC = torch.where(sound_B1, logits_BC, 0.0).softmax(dim=-1)
        if self.soft:
            cast_BC = p_BC
        else:
            class_C = torch.arange(self.n_classes, device=p_BC.device)
            cast_BC = (p_BC.argmax(dim=-1, keepdim=True) == class_C).to(torch.float32)
        votes_BC = state["votes"].to(torch.float32) + torch.where(sound_B1, cast_BC, 0.0)
        votes_BC = votes_BC.clamp(max=_MAX_COUNT)
        most_B = votes_BC.amax(dim=-1)
        seen = sum(place <= depth for place in self.exits)
        leave_B = (most_B / seen**self.exponent >= knobs["tau"]) & sound_B1[:, 0]
        weight_BC = votes_BC if self.soft else votes_BC + _TIE_BREAK * p_BC
        share_BC = weight_BC / weight_BC.sum(dim=-1, keepdim=True).clamp(min=_LEAST_SHARE)
        kept_BC = votes_BC if self.soft else votes_BC.to(torch.uint8)
        confidence_B = (most_B / len(self.exits)).clamp(0.0, 1.0)
        answer_BC = share_BC.clamp(min=_LEAST_SHARE).log()
        return Decision(leave_B, answer_BC, confidence_B, {"votes": kept_BC})


def _policy(spec: HeadSpec) -> VotePolicy:
    exponent, votes = float(spec.settings["lambda"]), spec.settings["votes"]
    if not 0 <= exponent < 1:
        raise ValueError(f"lambda {exponent}: at least 0 and below 1, where all leave at exit 1")
    if votes not in ("hard", "soft"):
        raise ValueError(f"votes {votes!r}: must be hard or soft")
    return VotePolicy(len(spec.task.labels), spec.exits, exponent, votes == "soft")


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    return nn.ModuleDict({str(depth): PooledClassifier(spec) for depth in spec.exits})


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    policy = _policy(spec)
    # All exits' votes; the last exit but one has fewer, so that nobody ever gets `never` of them.
    high, never = float(max(len(spec.exits), 2)) ** (1 - policy.exponent), float(spec.n_layers)
    low, whole = (0.0, False) if policy.soft else (1.0, policy.exponent == 0)
    meaning = "tau: leave where the votes for a class, over i^lambda, have reached it"
    return (KnobSpec("tau", low, high, never=never, meaning=meaning, integer=whole),)


METHOD = Method(
    name="ensemble_ic",
    paper=Paper(
        "Early Exiting with Ensemble Internal Classifiers",
        "Sun, Zhou, Liu, Zhang, Jiang, Cao, Huang, Qiu",
        "arXiv 2021",
        "https://arxiv.org/abs/2105.13792",
    ),
    rule=(
        "Leave when enough exits have voted for one class, and answer with it. Carried: the votes."
    ),
    tasks=("classification",),
    policy=_policy,
    branches=_branches,
    knobs=_knobs,
    recipe="ensemble_ic",
    use=(
        "Where single exits are unsteady and an ensemble of them is better than any; exits that disagree "
        "once do not start from nothing, as patience does."
    ),
    avoid=(
        "Where the full model's own answers must be kept: even at full depth the exits' majority answers, "
        "and weak first exits have as much say as the last."
    ),
    reported=(
        "Better trade-offs than exits by confidence and by patience (abstract); no number is verified."
    ),
    settings={"pooling": "first", "lambda": 0.0, "votes": "hard"},
)
