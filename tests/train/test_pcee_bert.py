"""PCEE-BERT has no recipe of its own: it trains as PABEE does."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import make_checkpoint, write_topics
from trainers import make_trainer, small_config

from offramp_common.errors import ConfigError
from offramp_train.build import resolve_config
from offramp_train.data import read_splits
from offramp_train.recipe_check import check_model
from offramp_train.recipes import RECIPES


def test_it_trains_by_pabees_recipe_in_which_nothing_is_frozen() -> None:
    config = resolve_config({"method": "pcee_bert"}, where="x")
    assert config.recipe == "pabee"
    assert [stage.trains for stage in RECIPES["pabee"].stages] == ["all"]


def test_recipes_that_freeze_the_final_head_first_are_refused_for_its_shared_pooler(
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    splits = read_splits(write_topics(tmp_path / "topics"))
    config = small_config(method="pcee_bert")
    model = make_trainer(config, splits, checkpoint, tmp_path / "work").model
    for name in ("deebert", "fastbert"):
        with pytest.raises(ConfigError, match="pcee_bert's exits share weights with it"):
            check_model(RECIPES[name], model, {})
    for name in ("pabee", "elasticbert"):
        check_model(RECIPES[name], model, {})
