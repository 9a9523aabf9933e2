"""The table of training recipes, in order of year. One paper, one file, named as its method."""

from __future__ import annotations

from offramp_common.errors import ConfigError
from offramp_train.recipes import deebert, pabee, self_distilled_joint
from offramp_train.recipes.recipe import Recipe

_LISTED: tuple[Recipe, ...] = (
    deebert.RECIPE,
    pabee.RECIPE,
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
