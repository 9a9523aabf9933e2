"""CATs. Consistent Accelerated Inference via Confident Adaptive Transformers.

Schuster, Fisch, Jaakkola, Barzilay. EMNLP 2021. https://aclanthology.org/2021.emnlp-main.406

The rule: at each exit a small meta classifier scores how likely it is that this exit's answer is the full
model's (its class; within `tolerance` of its value); a sample leaves where the score is above lambda,
strictly. `offramp calibrate --epsilon E` chooses lambda so that answers agree with the full model's with
probability 1 - E at least (offramp_train.conformal). Carried: what earlier exits said.

Differs from the paper:
1. Where exits stand after some layers only, it is exits that are counted: L is their number.
2. Carried to exit l are the answers of exits 2 to l - 1 as probabilities over all classes, newest
   first, because only exit l knows which class they are read at (regression: values of all exits).
3. The meta classifier is one for each exit, or with `meta = "shared"` the same for all.
4. Heads do not read earlier heads' logits, an option of the official code. Of its calibrations only
   the common threshold is offered: neither one for each layer nor other scores.
5. lambda = infinity is kept as 1.0, which no score is above.
6. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").
7. Confidence is the score (1 at the last exit). A sample whose score or answer is NaN never leaves
   early.
8. Temperatures are the exact minimum of the loss that the paper goes down with Adam. The shares of rows set
   apart, and the meta classifiers' rate, updates and rows, are ours (offramp_train.fits.cats).
Not verified: the data sets, the backbone's size, typical values of epsilon, layer counts; the order
and padding of a regression's history are taken to be those of a classification's. What must cross is our
own derivation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec, StateField
from offramp_model.exits import Branch, Decision, HeadSpec, PooledClassifier, State, pool
from offramp_model.methods.method import Method, Paper

_NARROW = 32


class Kept(nn.Linear):
    """Fitted when the matrices are already as the bundle stores them, so it is not stored as int8."""


class Meta(nn.Sequential):
    """(B, inputs) -> (B, 2): logits of "differs from the full model" and "agrees"."""

    def __init__(self, inputs: int) -> None:
        super().__init__(Kept(inputs, _NARROW), nn.Tanh(), Kept(_NARROW, 2))


class MetaBranch(Branch):
    """Exit `index` (from 0) of `n`: narrow -> tanh -> answer, and the meta classifier's score.

    Logits are divided by `temperature` (1,), fitted after training, here and everywhere.
    """

    temperature: Tensor

    def __init__(self, spec: HeadSpec, index: int, n: int, meta: Meta | None = None) -> None:
        super().__init__()
        self.pooling = str(spec.settings.get("pooling", "first"))
        self.classes = len(spec.task.labels)
        self.slots, self.past, self.progress = max(n - 3, 0), max(index - 1, 0), index / (n - 1)
        self.dropout = nn.Dropout(spec.dropout)
        self.narrow = nn.Linear(spec.width, _NARROW)
        self.classifier = nn.Linear(_NARROW, spec.task.answer_width)
        self.register_buffer("temperature", torch.ones(1))
        own = self.classes + 2 if self.classes else 0
        self.meta = Meta(own + _NARROW + self.slots + 1) if meta is None else meta

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        narrow_BE = torch.tanh(self.narrow(self.dropout(pool(hidden_BTD, mask_BT, self.pooling))))
        logits_BC = self.classifier(narrow_BE) / self.temperature
        known = self.about(logits_BC, narrow_BE, state)
        score_B = torch.softmax(self.meta(torch.cat(known, dim=-1)), dim=-1)[:, 1]
        return {"logits": logits_BC, "score": score_B}

    def about(self, logits_BC: Tensor, narrow_BE: Tensor, state: State) -> list[Tensor]:
        """What the meta classifier reads, in the paper's order."""
        progress_B1 = torch.full_like(narrow_BE[:, :1], self.progress)
        if not self.classes:
            # A value's history ends one exit earlier than a class's.
            past_BK = state["history"][:, 1:] if self.past else None
            return [narrow_BE, *self._padded(past_BK, narrow_BE), progress_B1]
        p_BC = torch.softmax(logits_BC, dim=-1)
        top_B2 = p_BC.topk(2, dim=-1).values
        class_B1 = p_BC.argmax(dim=-1, keepdim=True)
        one_hot_BC = (torch.arange(self.classes, device=p_BC.device) == class_B1).to(p_BC.dtype)
        past_BK = (state["history"] * one_hot_BC[:, None, :]).sum(dim=-1) if self.past else None
        margin_B1 = top_B2[:, :1] - top_B2[:, 1:]
        history = self._padded(past_BK, narrow_BE)
        return [one_hot_BC, narrow_BE, top_B2[:, :1], margin_B1, *history, progress_B1]

    def _padded(self, past_BK: Tensor | None, like_BE: Tensor) -> list[Tensor]:
        """With zeros to `slots` columns; nothing where there are none."""
        if not self.slots:
            return []
        if past_BK is None:
            return [torch.zeros_like(like_BE[:, :1]).expand(-1, self.slots)]
        return [nn.functional.pad(past_BK, (0, self.slots - past_BK.shape[1]))]


@dataclass(frozen=True)
class ConsistencyPolicy:
    """Leave where the score is above the knob `threshold`.

    State: history, newest first: after exit k the probabilities (k - 1, C) of exits 2 to k, or the k
    values of a regression.

    exits       depths with an exit;  n_classes: 0 for a regression
    tolerance   a value so near the full model's agrees with it
    """

    exits: tuple[int, ...]
    n_classes: int
    tolerance: float

    def state_fields(self, depth: int) -> dict[str, StateField]:
        kept = self.exits.index(depth) + (0 if self.n_classes else 1)
        if depth == self.exits[-1] or not kept:
            return {}
        shape = (kept, self.n_classes) if self.n_classes else (kept,)
        return {"history": StateField("float32", shape)}

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        return {}

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        logits_BC = outputs["logits"]
        if depth == self.exits[-1]:
            # The full model agrees with itself; "score" is what early exits have.
            score_B = torch.where(logits_BC.isnan().any(dim=-1), 0.0, 1.0)
            return Decision(score_B > knobs["threshold"], logits_BC, score_B, {})
        # A score reads features and earlier answers; this answer itself may be NaN beside a sound score.
        score_B = torch.where(logits_BC.isnan().any(dim=-1), float("nan"), outputs["score"])
        confidence_B = torch.where(score_B.isnan(), 0.0, score_B)
        after: dict[str, Tensor] = {}
        if self.state_fields(depth):
            mine = torch.softmax(logits_BC, dim=-1)[:, None] if self.n_classes else logits_BC
            after["history"] = torch.cat([mine, *state.values()], dim=1)
        # A NaN compares false, so such a row stays.
        return Decision(score_B > knobs["threshold"], logits_BC, confidence_B, after)

    def agrees(self, answer_BC: Tensor, full_BC: Tensor) -> Tensor:
        """Whether an answer is the full model's: what calibration guarantees, (B,); False for NaN."""
        if not self.n_classes:
            return (answer_BC - full_BC).abs()[:, 0] <= self.tolerance
        broken_B = answer_BC.isnan().any(dim=-1) | full_BC.isnan().any(dim=-1)
        return (answer_BC.argmax(dim=-1) == full_BC.argmax(dim=-1)) & ~broken_B


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    how, n = spec.settings.get("meta", "each"), len(spec.exits)
    if how not in ("each", "shared"):
        raise ValueError(f"meta {how!r}: must be each or shared")
    heads: dict[str, nn.Module] = {}
    meta: Meta | None = None
    for index, depth in enumerate(spec.exits[:-1]):
        head = MetaBranch(spec, index, n, meta)
        heads[str(depth)], meta = head, head.meta if how == "shared" else None
    return nn.ModuleDict({**heads, str(spec.exits[-1]): PooledClassifier(spec)})


def _policy(spec: HeadSpec) -> ConsistencyPolicy:
    tolerance = float(spec.settings.get("tolerance", 0.5))
    return ConsistencyPolicy(spec.exits, len(spec.task.labels), tolerance)


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    # A little below 0, so that even a score of 0 can be told to leave.
    meaning = "lambda: leave where the meta classifier's score is above it"
    return (KnobSpec("threshold", -0.01, 1.0, never=1.0, meaning=meaning),)


METHOD = Method(
    name="cats",
    paper=Paper(
        "Consistent Accelerated Inference via Confident Adaptive Transformers",
        "Schuster, Fisch, Jaakkola, Barzilay",
        "EMNLP 2021",
        "https://aclanthology.org/2021.emnlp-main.406",
    ),
    rule=(
        "Leave where a small classifier is sure enough that the answer is the full model's; how sure is "
        "calibrated, with a guarantee. Carried: the probabilities (or values) that earlier exits gave."
    ),
    tasks=("classification", "regression"),
    policy=_policy,
    branches=_branches,
    knobs=_knobs,
    recipe="cats",
    use=(
        "Where a promise is wanted: answers agree with the full model's with a probability that you choose, "
        "on data like the calibration rows."
    ),
    avoid=(
        "Where the data drifts from the calibration rows (the promise is void), or few of those have an exit "
        "that disagrees (below 1 / epsilon nobody leaves early). It promises agreement, not accuracy."
    ),
    reported=(
        "Fewer layers at a chosen agreement with the full model on four tasks (abstract); layer counts not "
        "verified."
    ),
    settings={"pooling": "first", "meta": "each", "tolerance": 0.5},
    guarantee="conformal",
)
