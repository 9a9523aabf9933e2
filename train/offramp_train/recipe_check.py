"""Whether a recipe fits a method and its settings, and what of the model a stage trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.methods import METHODS, Method
from offramp_model.split_model import MultiExitModel
from offramp_train.recipes import RECIPES
from offramp_train.recipes.recipe import Recipe, Setting, Stage


def loss_settings(recipe: Recipe, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The recipe's [loss] settings, the user's over its defaults. Raises ConfigError."""
    known = {setting.name: setting for setting in recipe.settings}
    for key in given:
        if key not in known:
            have = f"it has: {', '.join(known)}" if known else "it has none"
            others = [r.name for r in RECIPES.values() if key in {s.name for s in r.settings}]
            hint = f" ({', '.join(others)} would have it)" if others else ""
            raise ConfigError(f"{where}: recipe {recipe.name} has no loss.{key}; {have}{hint}")
    return {
        name: _checked(setting, given.get(name, setting.default), where)
        for name, setting in known.items()
    }


def _checked(setting: Setting, value: Any, where: str) -> Any:
    name = f"{where}: loss.{setting.name} = {value!r}"
    if setting.choices:
        if value not in setting.choices:
            raise ConfigError(f"{name}: must be {' or '.join(setting.choices)}")
        return value
    several = isinstance(setting.default, tuple)
    values = list(value) if several and isinstance(value, list | tuple) else [value]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) != len(values) or not all(setting.low <= v <= setting.high for v in numbers):
        what = "numbers" if several else "a number"
        raise ConfigError(f"{name}: must be {what} from {setting.low:g} to {setting.high:g}")
    return tuple(map(float, numbers)) if several else float(value)


def check_recipe(
    recipe: Recipe,
    method: Method,
    task: TaskSpec,
    method_settings: Mapping[str, Any],
) -> None:
    """Raises ConfigError, with the reason, where the recipe makes no sense for the method and task."""
    if task.kind not in recipe.tasks:
        able = ", ".join(r.name for r in RECIPES.values() if task.kind in r.tasks)
        raise ConfigError(
            f"recipe {recipe.name} has no loss for {task.kind}; recipes that have: {able}"
        )
    learned = set(method.learned(method_settings))
    lacking = sorted(set(recipe.needs) - learned)
    if lacking:
        having = [m.name for m in METHODS.values() if lacking[0] in m.learned(m.settings)]
        raise ConfigError(
            f"recipe {recipe.name} trains the exits' {lacking[0]!r}, which {method.name} does not "
            f"have; methods that have: {', '.join(having)}"
        )
    untaught = sorted(learned - set(recipe.teaches))
    if untaught:
        fitting = [
            r.name
            for r in RECIPES.values()
            if task.kind in r.tasks and learned <= set(r.teaches) and set(r.needs) <= learned
        ]
        raise ConfigError(
            f"recipe {recipe.name} would leave {method.name}'s {untaught[0]!r} untrained; recipes "
            f"that fit: {', '.join(fitting)}"
        )


def check_model(recipe: Recipe, model: MultiExitModel, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError, with the reason, where the recipe makes no sense for the model's exits."""
    exits = model.spec.exits
    if any(stage.trains == "early exits" for stage in recipe.stages):
        if len(exits) < 2:
            raise ConfigError(
                f"recipe {recipe.name} trains early exits in a stage of their own, and exits {exits} "
                "has only the final one; add exits"
            )
        final = {id(p) for p in model.exits[str(model.n_layers)].parameters()}
        early = (p for head in _early(model) for p in head.parameters())
        if any(id(p) in final for p in early):
            kind = model.spec.task.kind
            able = [r for r in RECIPES.values() if kind in r.tasks and len(r.stages) == 1]
            joint = [r.name for r in able if _plain(r)]
            raise ConfigError(
                f"recipe {recipe.name} freezes the final head before it trains the early exits, but "
                f"{model.method.name}'s exits share weights with it; use one of {', '.join(joint)}"
            )
    if recipe.check is not None:
        recipe.check(model, settings)


def _plain(recipe: Recipe) -> bool:
    return recipe.needs == ("logits",)


def _early(model: MultiExitModel) -> Sequence[nn.Module]:
    """What looks before the final exit."""
    return [head for depth, head in model.exits.items() if depth != str(model.n_layers)]


def set_trainable(model: MultiExitModel, stage: Stage, freeze_embeddings: bool) -> None:
    """Sets requires_grad for the stage; what does not learn gets no gradient and no update."""
    model.requires_grad_(stage.trains == "all")
    if stage.trains == "backbone+final":
        model.backbone.requires_grad_(True)
        model.exits[str(model.n_layers)].requires_grad_(True)
    elif stage.trains == "early exits":
        for head in _early(model):
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
