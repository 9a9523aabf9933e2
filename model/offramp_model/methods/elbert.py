"""ELBERT: Fast ALBERT with Confidence-Window Based Early Exit.

Xie, Lu, Wang, Wang. ICASSP 2021. https://arxiv.org/abs/2107.00175

The rule: one and the same head stands after every layer. A sample leaves where the entropy of its softmax
over ln C is below delta, strictly; or where the last N exits (the window) agree on a class, setting
`window`: "same-side", it is the top one at all of them; "monotone", and its probability never fell;
"flat", and its probabilities lie within r of each other.

Differs from the paper:
1. The official code follows the probability x of class 0, which says something of two classes only. Here
   it is the top class that is followed; with two classes the rules are the same ("rising" is "further to
   its side").
2. Margin m: with two classes x must be further than m from 1/2; here the first class must lead the second
   by more than 2 m, which is the same for two. A tie is on no side.
3. Both stages are off at delta = never = -1; at delta = 0 the window alone decides.
4. Windows are kept per row; the official code compares the batch's mean entropy.
5. Delta may be given for each exit. Where exits stand after some layers only, it is exits that are counted.
6. Carried: "same-side" how many exits agreed, and on which class; "monotone" the last probability too;
   "flat" the last N - 1 probabilities, and the class, which two classes alone would not need.
7. A row with NaN probabilities is on no side and starts its window anew; counts stop at 255.
8. Any backbone may stand below; the paper's is ALBERT, whose layers share weights as well.
9. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").
10. Confidence is 1 - H / ln C, for the planner (no exit depends on it); the paper has none.
Not verified: results but RTE's; the default window of 4 is ours (the code's example: 8 of 24 layers). The
rules for more than two classes, and what must cross, are our own derivation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec, StateField
from offramp_model.exits import Decision, HeadSpec, PooledClassifier, State
from offramp_model.methods.deebert import entropy
from offramp_model.methods.method import Method, Paper

_NO_SIDE = -1
# A probability that does not count. Not NaN: runtimes differ in what a minimum makes of it.
_NO_VALUE = -1.0
_MAX_COUNT = 255
_WINDOWS = ("same-side", "monotone", "flat")


@dataclass(frozen=True)
class WindowPolicy:
    """Leave where normalised entropy is below the knob `delta`, or where a window of exits is steady.

    State, none where the window is of one exit: side (int16, the class), and run (uint8, exits in a row that
    agreed, this one included), for "monotone" last (float32); for "flat" instead of run
    recent (float32, the probabilities of the last `size` - 1 exits, or as many as there were).

    exits        depths with an exit
    window       one of _WINDOWS;  size: N, exits in it
    margin       m;  flat_range: r, for "flat" only
    """

    n_classes: int
    exits: tuple[int, ...]
    window: str
    size: int
    margin: float
    flat_range: float

    def state_fields(self, depth: int) -> dict[str, StateField]:
        if self.size == 1:
            return {}
        side = {"side": StateField("int16")}
        if self.window == "flat":
            kept = min(sum(place <= depth for place in self.exits), self.size - 1)
            return {**side, "recent": StateField("float32", (kept,))}
        last = {"last": StateField("float32")} if self.window == "monotone" else {}
        return {"run": StateField("uint8"), **side, **last}

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        none_B = torch.full((mask_BT.shape[0],), _NO_VALUE, device=mask_BT.device)
        return {
            "run": torch.zeros_like(none_B, dtype=torch.uint8),
            "side": torch.full_like(none_B, _NO_SIDE, dtype=torch.int16),
            "last": none_B,
            "recent": none_B.new_zeros((len(none_B), 0)),
        }

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        logits_BC, delta = outputs["logits"], knobs["delta"]
        unsure_B = entropy(logits_BC) / math.log(self.n_classes)
        p_BC = logits_BC.softmax(dim=-1)
        top2 = torch.topk(p_BC, 2, dim=-1)
        top_B, second_B = top2.values.unbind(dim=-1)
        class_B = top2.indices[:, 0]
        # A NaN compares false: no side, and not sure.
        side_B = torch.where(top_B - second_B > 2 * self.margin, class_B, _NO_SIDE)
        if self.size == 1:
            steady_B, state = side_B != _NO_SIDE, {}
        else:
            agree_B = (side_B == state["side"].to(torch.int64)) & (side_B != _NO_SIDE)
            track = self._flat if self.window == "flat" else self._run
            steady_B, state = track(agree_B, side_B, top_B, state)
            state = {"side": side_B.to(torch.int16), **state}
        leave_B = ((unsure_B < delta) | steady_B) & (delta >= 0)
        confidence_B = torch.where(unsure_B.isnan(), 0.0, 1.0 - unsure_B).clamp(0.0, 1.0)
        return Decision(leave_B, logits_BC, confidence_B, state)

    def _run(
        self, agree_B: Tensor, side_B: Tensor, top_B: Tensor, state: State
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(which rows are steady, the rest of the state). Only neighbours are compared: a count will do."""
        monotone = self.window == "monotone"
        if monotone:
            agree_B = agree_B & (top_B >= state["last"])
        longer_B = torch.where(agree_B, state["run"].to(torch.int32) + 1, 1).clamp(max=_MAX_COUNT)
        run_B = torch.where(side_B != _NO_SIDE, longer_B, 0)
        last = {"last": torch.where(top_B.isnan(), _NO_VALUE, top_B)} if monotone else {}
        return run_B >= self.size, {"run": run_B.to(torch.uint8), **last}

    def _flat(
        self, agree_B: Tensor, side_B: Tensor, top_B: Tensor, state: State
    ) -> tuple[Tensor, dict[str, Tensor]]:
        now_B = torch.where(side_B != _NO_SIDE, top_B, _NO_VALUE)
        before_BN = torch.where(agree_B.unsqueeze(-1), state["recent"], _NO_VALUE)
        recent_BN = torch.cat([before_BN, now_B.unsqueeze(-1)], dim=-1)
        if recent_BN.shape[-1] < self.size:
            return torch.zeros_like(agree_B), {"recent": recent_BN}
        lowest_B = recent_BN.amin(dim=-1)
        steady_B = (lowest_B >= 0) & (recent_BN.amax(dim=-1) - lowest_B <= self.flat_range)
        return steady_B, {"recent": recent_BN[:, 1:]}


def _policy(spec: HeadSpec) -> WindowPolicy:
    s = spec.settings
    window, size = s["window"], s["window_size"]
    margin, flat_range = float(s["margin"]), float(s["flat_range"])
    if window not in _WINDOWS:
        raise ValueError(f"window {window!r}: must be {', '.join(_WINDOWS)}")
    if size not in range(1, _MAX_COUNT + 1):
        raise ValueError(f"window_size {size}: a whole number from 1 to {_MAX_COUNT}")
    if not (0 <= margin < 0.5 and 0 <= flat_range <= 1):
        raise ValueError(f"margin {margin} in [0, 0.5) and flat_range {flat_range} in [0, 1]")
    return WindowPolicy(len(spec.task.labels), spec.exits, window, int(size), margin, flat_range)


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    head = PooledClassifier(spec)
    return nn.ModuleDict({str(depth): head for depth in spec.exits})


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    meaning = (
        "leave where entropy / ln C is below it, or the window is steady; -1 switches both off"
    )
    # A little above 1, so that even uniform logits can be told to leave.
    return (KnobSpec("delta", 0.0, 1.01, never=-1.0, meaning=meaning),)


METHOD = Method(
    name="elbert",
    paper=Paper(
        "ELBERT: Fast ALBERT with Confidence-Window Based Early Exit",
        "Xie, Lu, Wang, Wang",
        "ICASSP 2021",
        "https://arxiv.org/abs/2107.00175",
    ),
    rule=(
        "Leave where normalised entropy is below a threshold, or where the last exits agree on a class. "
        "Carried: how many agreed, and on what."
    ),
    tasks=("classification",),
    policy=_policy,
    branches=_branches,
    knobs=_knobs,
    recipe="elbert",
    use=(
        "Where the model must stay small: no exit adds a weight, and with ALBERT's shared layers the whole "
        "model is little more than one layer."
    ),
    avoid=(
        "Where layers say very different things: one head must read them all. And where a continuous knob "
        "must reach from none to all: the window lets rows go whatever delta is."
    ),
    reported=(
        "2x to 10x faster than ALBERT with negligible loss (abstract); RTE with ALBERT-large 81.2 at 58.8 % "
        "of the compute (official README)."
    ),
    settings={
        "pooling": "first",
        "window": "same-side",
        "window_size": 4,
        "margin": 0.0,
        "flat_range": 0.1,
    },
)
