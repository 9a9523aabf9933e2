"""The table of training recipes, in order of year. One paper, one file, named as its method."""

from __future__ import annotations

from offramp_common.errors import ConfigError
from offramp_train.recipes import (
    be3r,
    berxit,
    cats,
    class_means,
    dact_bert,
    deebert,
    elasticbert,
    elbert,
    ensemble_ic,
    fastbert,
    gaml_bert,
    leebert,
    pabee,
    palbert,
    past_future,
    right_tool,
    romebert,
    self_distilled_joint,
)
from offramp_train.recipes.recipe import Recipe

_LISTED: tuple[Recipe, ...] = (
    deebert.RECIPE,
    right_tool.RECIPE,
    fastbert.RECIPE,
    pabee.RECIPE,
    past_future.RECIPE,
    romebert.RECIPE,
    berxit.RECIPE,
    leebert.RECIPE,
    class_means.RECIPE,
    ensemble_ic.RECIPE,
    elbert.RECIPE,
    cats.RECIPE,
    dact_bert.RECIPE,
    elasticbert.RECIPE,
    gaml_bert.RECIPE,
    palbert.RECIPE,
    be3r.RECIPE,
    self_distilled_joint.RECIPE,
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _LISTED}
if len(RECIPES) != len(_LISTED):
    raise RuntimeError("two recipes share a name")


def recipe_named(name: str) -> Recipe:
    """Raises ConfigError for a name that is not in the table."""
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} is unknown; known: {', '.join(RECIPES)}")
    return RECIPES[name]
