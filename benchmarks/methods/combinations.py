"""Which recipes train which methods, and why the others are refused: asked of the program itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.backbones import backbone_from_config
from offramp_model.exits import HeadSpec
from offramp_model.methods import Method
from offramp_model.split_model import MultiExitModel
from offramp_train.recipe_check import check_model, check_recipe, loss_settings
from offramp_train.recipes import RECIPES
from offramp_train.recipes.recipe import Recipe

_TASKS = {
    "classification": TaskSpec("classification", ("a", "b", "c")),
    "regression": TaskSpec("regression"),
}
# The smallest encoder with as many layers as the comparison's: sizes do not matter here.
_CONFIG = {
    "model_type": "bert",
    "vocab_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 8,
}


@dataclass(frozen=True, slots=True)
class Combinations:
    """fits: recipe -> the tasks it fits for;  refused: reason -> the recipes, for all tasks or one."""

    fits: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, tuple[str, ...]]


def combinations(
    method: Method, kinds: tuple[str, ...], settings: Mapping[str, Any]
) -> Combinations:
    """Of a method with these structural settings for tasks of these kinds, an exit after every layer."""
    fits: dict[str, tuple[str, ...]] = {}
    refused: dict[str, list[str]] = {}
    models = {kind: _model(method, kind, settings) for kind in kinds}
    for recipe in RECIPES.values():
        reasons = {kind: _reason(recipe, model, kind) for kind, model in models.items()}
        fits[recipe.name] = tuple(kind for kind, reason in reasons.items() if not reason)
        for kind, reason in reasons.items():
            if not reason:
                continue
            everywhere = all(reasons.values()) and len(set(reasons.values())) == 1
            name = recipe.name if everywhere or len(models) == 1 else f"{recipe.name} ({kind})"
            if name not in refused.setdefault(reason, []):
                refused[reason].append(name)
    return Combinations(
        {name: kinds for name, kinds in fits.items() if kinds},
        {reason: tuple(names) for reason, names in refused.items()},
    )


def _reason(recipe: Recipe, model: MultiExitModel, kind: str) -> str:
    """Why the recipe is refused, without what to take instead (the page has that); "" where it is not."""
    try:
        check_recipe(recipe, model.method, _TASKS[kind], model.spec.settings)
        check_model(recipe, model, loss_settings(recipe, {}, "settings"))
    except ConfigError as error:
        return str(error).partition(";")[0].replace(f"recipe {recipe.name}", "it", 1)
    return ""


def _model(method: Method, kind: str, settings: Mapping[str, Any]) -> MultiExitModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = backbone_from_config(_CONFIG)
        exits = tuple(range(1, backbone.n_layers + 1))
        chosen = {**method.settings, **settings}
        spec = HeadSpec(_TASKS[kind], backbone.width, backbone.n_layers, exits, chosen)
        return MultiExitModel(backbone, method, spec)
