"""What a training recipe is: stages, each with what learns, from which loss, and by which gradients.

A recipe is independent of the exit method; `check.check_recipe` refuses the pairs that make no sense.

Axes: B samples, T tokens, D hidden width, C answer width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Batch


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a stage's training is: update `step` of `steps`, in `epoch`, all counted from 0.

    settings   the recipe's [loss] settings
    exits      depths with an exit, ascending
    """

    step: int
    steps: int
    epoch: int
    n_layers: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    exits: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """What one forward pass of a batch showed; what losses are made from.

    outputs    depth -> the branch's named tensors, float32, gradients attached; layers that a method
               reads without an exit are among them
    exits      depths with an exit, ascending; the last is the final one
    target_B   class index (int64) or value (float32);  weight_B: of each row in the loss
    settings   the recipe's [loss] settings
    extra      what the recipe learns beside the model, or None
    """

    outputs: Mapping[int, Mapping[str, Tensor]]
    exits: tuple[int, ...]
    target_B: Tensor
    weight_B: Tensor
    task: TaskSpec
    settings: Mapping[str, Any]
    progress: Progress
    extra: nn.Module | None = None

    @property
    def answers(self) -> dict[int, Tensor]:
        """Depth -> (B, C): the logits, or the value, of the exit at that depth."""
        return self.named("logits")

    def named(self, name: str) -> dict[int, Tensor]:
        """Depth -> the branch output of that name, at every exit that has it."""
        return {d: self.outputs[d][name] for d in self.exits if name in self.outputs[d]}

    def losses(self) -> dict[int, Tensor]:
        """Depth -> the exit's loss on the labels, the weighted mean over rows, a scalar."""
        return {d: self.mean(self.row_losses(a)) for d, a in self.answers.items()}

    def row_losses(self, answer_BC: Tensor) -> Tensor:
        """Cross-entropy, or squared error, of each row: (B,)."""
        if self.task.kind == "regression":
            return (answer_BC[:, 0] - self.target_B).square()
        return nn.functional.cross_entropy(answer_BC, self.target_B, reduction="none")

    def mean(self, loss_B: Tensor) -> Tensor:
        """The mean over rows by their weights, a scalar."""
        return (loss_B * self.weight_B).sum() / self.weight_B.sum()


@dataclass(frozen=True, slots=True)
class Pass:
    """One update's work, for recipes that say themselves how gradients come about.

    see       one forward pass of a batch (again, if called again)
    batches   of this update; with `Recipe.halves` one from each half of the training rows
    lr        of the backbone in this update
    settings  the recipe's [loss] settings
    exact     as `see`, in float32 where training is in bfloat16: for small differences. None: `see` is
    """

    model: MultiExitModel
    extra: nn.Module | None
    see: Callable[[Batch], Seen]
    batches: Sequence[Batch]
    lr: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: Callable[[Batch], Seen] | None = None


Loss = Callable[[Seen], Tensor]
Between = Callable[[int, Tensor, Progress], tuple[Tensor, Tensor]]
"""(depth, hidden_BTD, progress) -> (what the exit head reads, what the next layer reads)."""


def gradients_of(loss: Loss) -> Callable[[Pass], float]:
    """The ordinary way: each batch's loss backward, the mean over the update's batches."""

    def gradients(work: Pass) -> float:
        total = 0.0
        for batch in work.batches:
            value = loss(work.see(batch))
            (value / len(work.batches)).backward()  # type: ignore[no-untyped-call]
            total += value.item()
        return total / len(work.batches)

    return gradients


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of training.

    trains     "all", "backbone+final" (everything but the early exits) or "early exits"
    watches    which exits' quality on dev decides the best epoch: "final", "early" or "all"
    gradients  leaves the update's gradients in .grad and returns the loss
    between    scales or stops gradients between layers
    quiet      the frozen backbone has no dropout
    """

    name: str
    trains: str
    watches: str
    gradients: Callable[[Pass], float]
    between: Between | None = None
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of [loss]. A number in [low, high], a tuple of such numbers, or one of `choices`."""

    name: str
    default: float | str | tuple[float, ...]
    meaning: str
    low: float = 0.0
    high: float = float("inf")
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a paper trains a multi-exit model.

    source    the paper, where it is one
    defaults  configuration tables that the user's are laid over
    settings  its keys of [loss]
    needs     branch outputs without which its loss makes no sense
    teaches   branch outputs that it can train; a method with others is refused
    tasks     the task kinds its loss is for
    extra     makes what it learns beside the model and throws away after
    halves    each update has one batch from each of two fixed halves of the training rows
    check     raises ConfigError, with the reason, where it makes no sense for the model and settings
    """

    name: str
    summary: str
    stages: tuple[Stage, ...]
    source: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    needs: tuple[str, ...] = ("logits",)
    teaches: tuple[str, ...] = ("logits",)
    tasks: tuple[str, ...] = ("classification", "regression")
    extra: Callable[[MultiExitModel, Mapping[str, Any]], nn.Module] | None = None
    halves: bool = False
    check: Callable[[MultiExitModel, Mapping[str, Any]], None] | None = None


# Losses that several recipes share


def final_loss(seen: Seen) -> Tensor:
    """The final exit's loss alone: plain fine-tuning."""
    return seen.mean(seen.row_losses(seen.answers[seen.exits[-1]]))


def early_sum(seen: Seen) -> Tensor:
    """The sum, not the mean, over the early exits, equal weights: DeeBERT's second stage."""
    losses = seen.losses()
    return torch.stack([losses[depth] for depth in seen.exits[:-1]]).sum()


def plain_sum(seen: Seen) -> Tensor:
    """The sum, not the mean, over all exits, equal weights."""
    return torch.stack(list(seen.losses().values())).sum()


def depth_weighted(seen: Seen) -> Tensor:
    """sum(i * L_i) / sum(i) over depths i: PABEE's, and its followers'."""
    losses = seen.losses()
    return torch.stack([d * loss for d, loss in losses.items()]).sum() / sum(losses)


def divergence(
    student_BC: Tensor, teacher_BC: Tensor, task: TaskSpec, temperature: float = 1.0
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row, (B,); values: squared distance.

    Gradients reach both sides: detach the teacher. Leading axes are broadcast.
    """
    if task.kind == "regression":
        return (student_BC - teacher_BC).square()[..., 0]
    log_p_BC = torch.log_softmax(student_BC / temperature, dim=-1)
    log_q_BC = torch.log_softmax(teacher_BC / temperature, dim=-1)
    kl_BC = nn.functional.kl_div(log_p_BC, log_q_BC, reduction="none", log_target=True)
    return temperature**2 * kl_BC.sum(dim=-1)


def mutual_divergence(seen: Seen, temperature: float, teacher_EBC: Tensor | None = None) -> Tensor:
    """`divergence` of exit i from exit j at [i, j], the mean over rows: (E, E) for E exits; 0 where i = j.

    Student i, teacher j. Teachers are the same answers, detached, unless others are given.
    """
    z_EBC = torch.stack(list(seen.answers.values()))
    teacher_EBC = z_EBC.detach() if teacher_EBC is None else teacher_EBC
    apart_EEB = divergence(z_EBC[:, None], teacher_EBC[None], seen.task, temperature)
    apart_EE = (apart_EEB * seen.weight_B).sum(dim=-1) / seen.weight_B.sum()
    # Its own gradient from itself is 0 but for rounding.
    return apart_EE * (1.0 - torch.eye(len(z_EBC), device=z_EBC.device))


# Checks that several recipes share


def needs_early_exits(model: MultiExitModel, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError where the final exit is the only one."""
    if len(model.spec.exits) < 2:
        raise ConfigError(
            f"exits {model.spec.exits} has only the final one, and this recipe has exits learn from "
            "each other; add exits"
        )
