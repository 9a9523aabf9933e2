"""Training recipes: which weights learn from which loss, stage by stage, and with which settings.

A recipe is independent of the exit method; `check_recipe` refuses the pairs that make no sense.

Axes: B samples, C answer width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.split_model import MultiExitModel
from offramp_train.config import Loss

Answers = Mapping[int, Tensor]
"""Depth -> (B, C): the logits, or the value, of the exit at that depth."""

StageLoss = Callable[[Answers, Tensor, Tensor, TaskSpec, Loss], Tensor]
"""(answers, target_B, weight_B, task, settings) -> the loss, a scalar."""


@dataclass(frozen=True, slots=True)
class Stage:
    """trains    "all", "backbone+final" (everything but the early exits) or "early exits"
    watches   which exits' quality on dev decides the best epoch: "final", "early" or "all"
    """

    name: str
    trains: str
    watches: str
    loss: StageLoss


@dataclass(frozen=True, slots=True)
class Recipe:
    """defaults   configuration tables that the user's are laid over
    loss_keys  keys of [loss] that mean something here
    """

    name: str
    summary: str
    stages: tuple[Stage, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    loss_keys: tuple[str, ...] = ()


def row_losses(answer_BC: Tensor, target_B: Tensor, task: TaskSpec) -> Tensor:
    """Cross-entropy, or squared error, of each row: (B,)."""
    if task.kind == "regression":
        return (answer_BC[:, 0] - target_B).square()
    return cross_entropy(answer_BC, target_B, reduction="none")


def _mean(loss_B: Tensor, weight_B: Tensor) -> Tensor:
    return (loss_B * weight_B).sum() / weight_B.sum()


def final_loss(
    answers: Answers, target_B: Tensor, weight_B: Tensor, task: TaskSpec, settings: Loss
) -> Tensor:
    """The deepest exit's loss: DeeBERT's first stage."""
    return _mean(row_losses(answers[max(answers)], target_B, task), weight_B)


def early_sum(
    answers: Answers, target_B: Tensor, weight_B: Tensor, task: TaskSpec, settings: Loss
) -> Tensor:
    """The sum, not the mean, over the early exits, equal weights: DeeBERT's second stage."""
    early = [answers[depth] for depth in sorted(answers)[:-1]]
    return torch.stack([_mean(row_losses(a, target_B, task), weight_B) for a in early]).sum()


def depth_weighted(
    answers: Answers, target_B: Tensor, weight_B: Tensor, task: TaskSpec, settings: Loss
) -> Tensor:
    """sum(i * L_i) / sum(i) over depths i: PABEE's."""
    terms = [depth * _mean(row_losses(a, target_B, task), weight_B) for depth, a in answers.items()]
    return torch.stack(terms).sum() / sum(answers)


def self_distilled(
    answers: Answers, target_B: Tensor, weight_B: Tensor, task: TaskSpec, settings: Loss
) -> Tensor:
    """Weighted mean over exits of (1 - a) L_i + a D(deepest, i); the deepest exit learns from labels alone.

    a is `distil`. D is T^2 KL(softmax(z_L / T) || softmax(z_i / T)), or the squared distance of two values;
    the deepest exit is detached: it teaches and is not pulled towards its pupils.
    """
    depths = sorted(answers)
    weights = settings.exit_weights or (1.0,) * len(depths)
    teacher = answers[depths[-1]].detach()
    terms = []
    for weight, depth in zip(weights, depths, strict=True):
        loss = _mean(row_losses(answers[depth], target_B, task), weight_B)
        if depth != depths[-1] and settings.distil > 0:
            distance_B = _distance(answers[depth], teacher, task, settings.temperature)
            loss = (1 - settings.distil) * loss + settings.distil * _mean(distance_B, weight_B)
        terms.append(weight * loss)
    return torch.stack(terms).sum() / sum(weights)


def _distance(answer_BC: Tensor, teacher_BC: Tensor, task: TaskSpec, temperature: float) -> Tensor:
    if task.kind == "regression":
        return (answer_BC - teacher_BC).square()[:, 0]
    log_p_BC = log_softmax(answer_BC / temperature, dim=-1)
    log_q_BC = log_softmax(teacher_BC / temperature, dim=-1)
    divergence_B = kl_div(log_p_BC, log_q_BC, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * divergence_B


_LISTED = (
    Recipe(
        "two-stage",
        "DeeBERT: the backbone and the final head first; then the early exits on the frozen backbone",
        (
            Stage("backbone and final head", "backbone+final", "final", final_loss),
            Stage("early exits", "early exits", "early", early_sum),
        ),
        # The official code's: AdamW, linear decay without warm-up, no weight decay, 3 epochs a stage.
        {"max_tokens": 128, "training": {"lr": 2e-5, "batch": 8, "epochs": 3, "keep": "last"}},
    ),
    Recipe(
        "weighted-joint",
        "PABEE: everything at once, each exit's loss weighted by its depth",
        (Stage("all exits", "all", "all", depth_weighted),),
        # The official README's: linear schedule, best epoch on dev.
        {"max_tokens": 128, "training": {"lr": 2e-5, "batch": 32, "epochs": 5, "keep": "best"}},
    ),
    Recipe(
        "self-distilled-joint",
        "ours: everything at once, early exits learn from labels and from the deepest exit",
        (Stage("all exits", "all", "all", self_distilled),),
        {
            "training": {
                "lr": 5e-5, "head_lr": 1e-3, "batch": 32, "epochs": 5, "warmup": 0.06,
                "weight_decay": 0.01, "keep": "best",
            }
        },
        ("exit_weights", "distil", "temperature"),
    ),
)  # fmt: skip
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _LISTED}


def recipe_named(name: str) -> Recipe:
    """Raises ConfigError for a name that is not in the table."""
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} is unknown; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def check_recipe(recipe: Recipe, model: MultiExitModel, loss: Loss) -> None:
    """Raises ConfigError, with the reason, where the recipe makes no sense for the model."""
    n_exits = len(model.spec.exits)
    if any(stage.trains == "early exits" for stage in recipe.stages):
        if n_exits < 2:
            raise ConfigError(
                f"recipe {recipe.name} trains early exits in a stage of their own, and exits "
                f"{model.spec.exits} has only the final one; add exits"
            )
        final = {id(p) for p in model.exits[str(model.n_layers)].parameters()}
        early = (p for depth in model.spec.exits[:-1] for p in model.exits[str(depth)].parameters())
        if any(id(p) in final for p in early):
            raise ConfigError(
                f"recipe {recipe.name} freezes the final head before it trains the early exits, but "
                f"{model.method.name}'s exits share weights with it; use weighted-joint or "
                "self-distilled-joint"
            )
    set_keys = [key for key in ("exit_weights", "distil", "temperature") if _changed(loss, key)]
    useless = [key for key in set_keys if key not in recipe.loss_keys]
    if useless:
        raise ConfigError(
            f"loss.{useless[0]}: recipe {recipe.name} has a fixed loss; use self-distilled-joint "
            "or leave it out"
        )
    if loss.exit_weights and len(loss.exit_weights) != n_exits:
        raise ConfigError(
            f"loss.exit_weights: {len(loss.exit_weights)} weights for {n_exits} exits"
        )


def _changed(loss: Loss, key: str) -> bool:
    return bool(getattr(loss, key) != getattr(Loss(), key))


def set_trainable(model: MultiExitModel, stage: Stage, freeze_embeddings: bool) -> None:
    """Sets requires_grad for the stage; what does not learn gets no gradient and no update."""
    final = str(model.n_layers)
    early: Sequence[nn.Module] = [head for depth, head in model.exits.items() if depth != final]
    model.requires_grad_(stage.trains == "all")
    if stage.trains == "backbone+final":
        model.backbone.requires_grad_(True)
        model.exits[final].requires_grad_(True)
    elif stage.trains == "early exits":
        for head in early:
            head.requires_grad_(True)
    if freeze_embeddings:
        model.backbone.embeddings.requires_grad_(False)


def start_heads(model: MultiExitModel, poolers: str) -> None:
    """Fresh exit heads: classifiers from N(0, 0.02), poolers from the checkpoint's where `poolers` allows.

    Raises ConfigError when "pretrained" is asked for and the checkpoint has none.
    """
    pretrained = model.backbone.pretrained_pooler
    first = model.spec.settings.get("pooling", "first") == "first"
    if poolers == "pretrained" and pretrained is None:
        raise ConfigError(
            "training.poolers = 'pretrained': this checkpoint has no pooler; use 'auto' or 'fresh'"
        )
    use = pretrained is not None and (poolers == "pretrained" or (poolers == "auto" and first))
    with torch.no_grad():
        for head in model.exits.values():
            for name, module in head.named_modules():
                if not isinstance(module, nn.Linear):
                    continue
                if name == "pooler" and use and pretrained is not None:
                    module.weight.copy_(pretrained[0])
                    module.bias.copy_(pretrained[1])
                elif name == "classifier":
                    module.weight.normal_(0.0, 0.02)
                    module.bias.zero_()
