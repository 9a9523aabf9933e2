"""GAML-BERT decides as PABEE does (test_pabee.py runs on it too); what is its own is the training
(tests/train/test_gaml_bert.py)."""

from __future__ import annotations

from toy_models import LABELS
from twins import assert_decides_as

from offramp_common.spec import TaskSpec
from offramp_model.methods import METHODS


def test_with_the_same_weights_it_decides_as_pabee_does() -> None:
    points = [{"patience": float(patience)} for patience in (1, 2, 3, 4)]
    assert_decides_as("gaml_bert", "pabee", TaskSpec("classification", LABELS), points)


def test_its_recipe_is_its_own_and_it_has_none_for_values() -> None:
    assert METHODS["gaml_bert"].recipe == "gaml_bert"
    assert METHODS["gaml_bert"].tasks == ("classification",)
