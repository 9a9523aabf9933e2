"""LeeBERT decides as PABEE does (test_pabee.py runs on it too); what is its own is the training
(tests/train/test_leebert.py)."""

from __future__ import annotations

import pytest
from toy_models import LABELS
from twins import assert_decides_as

from offramp_common.spec import TaskSpec
from offramp_model.methods import METHODS


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_with_the_same_weights_it_decides_as_pabee_does(kind: str) -> None:
    points = [{"patience": float(patience)} for patience in (1, 2, 3, 4)]
    if kind == "regression":
        points = [{**point, "tolerance": 1.0} for point in points]
    task = TaskSpec(kind, LABELS if kind == "classification" else ())
    assert_decides_as("leebert", "pabee", task, points)


def test_its_recipe_is_its_own() -> None:
    assert METHODS["leebert"].recipe == "leebert"
    assert METHODS["leebert"].tasks == METHODS["pabee"].tasks
