"""Every recipe with every method: an update that works, or a refusal that says why and what else to take."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from passes import make_pass, random_batch
from toy_models import LABELS, toy_model

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_train.recipe_check import check_model, check_recipe, loss_settings, set_trainable
from offramp_train.recipes import RECIPES
from offramp_train.recipes.recipe import Recipe

PAIRS = [
    (recipe, method.name, kind)
    for recipe in RECIPES
    for method in METHODS.values()
    for kind in method.tasks
]


def make_model(method: str, kind: str, exits: Sequence[int] = (1, 2, 3)) -> MultiExitModel:
    task = TaskSpec(kind, LABELS if kind == "classification" else ())
    return toy_model(method, task=task, exits=exits, seed=1)


def refusal(recipe: Recipe, model: MultiExitModel) -> str:
    """Why the recipe does not go with the model; "" where it does."""
    try:
        check_recipe(recipe, model.method, model.spec.task, model.spec.settings)
        check_model(recipe, model, loss_settings(recipe, {}, "test"))
    except ConfigError as error:
        return str(error)
    return ""


def update(recipe: Recipe, model: MultiExitModel, number: int) -> set[str]:
    """One update of this stage; the names of what it moves."""
    stage = recipe.stages[number]
    set_trainable(model.train(), stage, freeze_embeddings=False)
    model.zero_grad()
    batches = [random_batch(seed) for seed in ((1, 2) if recipe.halves else (1,))]
    torch.manual_seed(0)
    # Odd, and not the first epoch: where updates take turns, and early epochs are others, all exits learn.
    work = make_pass(model, recipe, batches, epoch=1)
    loss = stage.gradients(work)
    assert torch.isfinite(torch.tensor(loss)), stage.name
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values()), stage.name
    assert all(dict(model.named_parameters())[name].requires_grad for name in gradients)
    return {name for name, gradient in gradients.items() if bool((gradient != 0).any())}


REASONS = {
    "has no loss for": r"recipes that have: (.*)",
    "which": r"methods that have: (.*)",
    "untrained": r"recipes that fit: (.*)",
    "share weights": r"use one of (.*)",
}


def way_out(why: str) -> tuple[str, list[str]]:
    """(what the refusal is for, the names that it offers instead)."""
    ((reason, pattern),) = [(r, p) for r, p in REASONS.items() if r in why]
    found = re.search(pattern, why)
    assert found is not None, why
    return reason, found.group(1).split(", ")


@pytest.mark.parametrize(("recipe", "method", "kind"), PAIRS)
def test_a_pair_works_or_the_refusal_names_the_reason_and_what_to_take_instead(
    recipe: str, method: str, kind: str
) -> None:
    chosen, model = RECIPES[recipe], make_model(method, kind)
    why = refusal(chosen, model)
    if not why:
        moved = set().union(*(update(chosen, model, i) for i in range(len(chosen.stages))))
        for part in ("backbone.", "exits."):
            assert any(name.startswith(part) for name in moved), part
        return
    assert f"recipe {recipe} " in why
    reason, names = way_out(why)
    assert names[0], why
    for name in names:
        if reason == "which":
            assert set(chosen.needs) & set(METHODS[name].learned(METHODS[name].settings)), name
            continue
        assert kind in RECIPES[name].tasks, (why, name)
        then = refusal(RECIPES[name], model)
        # What exits share is known of the model only; that refusal has a way out of its own.
        assert (
            not then
            or (reason != "share weights" and "share weights" in then)
            or (reason == "has no loss for")
        ), (why, name, then)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_papers_own_recipe_is_never_refused(method: str) -> None:
    for kind in METHODS[method].tasks:
        assert refusal(RECIPES[METHODS[method].recipe], make_model(method, kind)) == ""
