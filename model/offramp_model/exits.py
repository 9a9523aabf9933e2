"""What an exit method is made of: branches (modules at exits) and a policy (when to leave).

Both are pure tensor functions, row by row, without Python branching on values: a layer, its branch and the
policy's decision export together as one ONNX graph, and the loop that lets rows leave
(offramp_common.runner) knows nothing of any paper.

Axes: B samples, T tokens, D hidden width, C answer width (classes; 1 for regression).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec, StateField, TaskSpec

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What a method needs to build its branches.

    exits      depths with an exit head, ascending; the last is n_layers
    settings   the method's own, from the bundle
    dropout    probability in training
    """

    task: TaskSpec
    width: int
    n_layers: int
    exits: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dropout: float = 0.1


class Branch(nn.Module):
    """The trainable part of an exit head. Subclasses give `forward`."""

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        """Named tensors for the policy, one row a sample; "logits" (B, C) where there are any."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Decision:
    """leave_B bool; answer (B, ...); confidence_B in [0, 1], higher is surer; state for the next exit."""

    leave_B: Tensor
    answer: Tensor
    confidence_B: Tensor
    state: dict[str, Tensor]


def nobody_leaves(answer_width: int, state: dict[str, Tensor]) -> Decision:
    """At a depth without an exit: only the state, (B, ...) of any name, counts there."""
    one = next(iter(state.values()))
    zero_BC = torch.zeros((one.shape[0], answer_width), device=one.device)
    return Decision(zero_BC[:, 0] > 0, zero_BC, zero_BC[:, 0], state)


class Policy(Protocol):
    """When a row leaves. A frozen dataclass of structural settings."""

    def state_fields(self, depth: int) -> dict[str, StateField]:
        """What crosses when the model is cut after the exit at `depth` has been looked at."""
        ...

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        """The state of these rows before the first exit. It never crosses: the first exit makes it."""
        ...

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        """`knobs` holds this exit's value of each knob, a scalar tensor."""
        ...


class Memoryless:
    """What policies share that carry nothing from exit to exit."""

    def state_fields(self, depth: int) -> dict[str, StateField]:
        return {}

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        return {}


def confidence_of(sure_B: Tensor) -> Tensor:
    """`sure_B` as a Decision's confidence: within [0, 1], and 0 where it is NaN."""
    return torch.where(sure_B.isnan(), 0.0, sure_B).clamp(0.0, 1.0)


class ExitHead(nn.Module):
    """The exit at one depth: branch, policy and state update as one function of tensors.

    exit   False where a method reads a layer that nobody leaves after: only its state is kept
    """

    def __init__(
        self, depth: int, first: bool, branch: Branch, policy: Policy, exit: bool = True
    ) -> None:
        super().__init__()
        self.depth, self.first, self.branch, self.policy = depth, first, branch, policy
        self.exit = exit

    def forward(
        self, hidden_BTD: Tensor, mask_BT: Tensor, state: State, knobs: Mapping[str, Tensor]
    ) -> tuple[Decision, dict[str, Tensor]]:
        """The decision, and the branch's outputs it was made from."""
        if self.first:
            state = self.policy.start(mask_BT)
        outputs = self.branch(hidden_BTD, mask_BT, state)
        return self.policy.decide(outputs, state, knobs, self.depth), outputs


class PooledClassifier(Branch):
    """pool -> dense, tanh -> dropout -> dense C: the head of BERT, and of most exit papers.

    pooling   "first": the first token's hidden state; "mean": the mean over real tokens
    pooler    None makes one of this exit's own; methods that share one among exits pass it
    """

    def __init__(self, spec: HeadSpec, pooler: nn.Linear | None = None) -> None:
        super().__init__()
        self.pooling = str(spec.settings.get("pooling", "first"))
        self.pooler = nn.Linear(spec.width, spec.width) if pooler is None else pooler
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(spec.width, spec.task.answer_width)

    def pooled(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, D): what the classifier reads, before dropout."""
        return torch.tanh(self.pooler(pool(hidden_BTD, mask_BT, self.pooling)))

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        pooled_BD = self.pooled(hidden_BTD, mask_BT)
        return {"logits": self.classifier(self.dropout(pooled_BD))}


def pool(hidden_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    """(B, D) from (B, T, D)."""
    if pooling == "first":
        return hidden_BTD[:, 0]
    if pooling == "mean":
        weight_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
        # Padding is without meaning and may hold anything, NaN too: 0 * NaN must not count.
        real_BTD = torch.where(mask_BT.unsqueeze(-1), hidden_BTD, 0.0)
        return real_BTD.sum(dim=1) / weight_BT1.sum(dim=1)
    raise ValueError(f"pooling {pooling!r}: must be first or mean")


def check_knobs(
    knobs: Mapping[str, tuple[float, ...]], specs: tuple[KnobSpec, ...], n: int
) -> None:
    """Raises ValueError unless `knobs` gives each knob one value in range for each of `n` depths."""
    names = [spec.name for spec in specs]
    if sorted(knobs) != sorted(names):
        raise ValueError(f"knobs {sorted(knobs)}: this method has {names}")
    for spec in specs:
        values = knobs[spec.name]
        if len(values) != n:
            raise ValueError(f"{spec.name}: {len(values)} values for {n} layers")
        allowed = [v for v in values if spec.low <= v <= spec.high or v == spec.never]
        if len(allowed) != n:
            raise ValueError(
                f"{spec.name}: values must lie in [{spec.low}, {spec.high}] or be {spec.never} (never leave)"
            )
