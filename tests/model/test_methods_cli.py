from __future__ import annotations

import json

import pytest

from offramp_common.cli import main
from offramp_model.methods import METHODS
from offramp_model.methods_cli import table
from offramp_train.recipes import RECIPES


def test_the_table_has_every_method_with_a_recipe_that_exists() -> None:
    rows = table()
    assert [row["name"] for row in rows] == list(METHODS)
    assert all(row["recipe"] in RECIPES for row in rows)
    assert all(row["rule"] and row["venue"] and row["link"].startswith("https://") for row in rows)


def test_carried_bytes_are_those_of_the_state() -> None:
    rows = {row["name"]: row for row in table()}
    assert rows["deebert"]["carried"] == {}
    assert rows["deebert"]["carried_bytes_per_row"] == 0
    # count (uint8) and previous (int16)
    assert rows["pabee"]["carried_bytes_per_row"] == 3
    assert rows["pabee"]["knobs"]["patience"]["tasks"] == ["classification", "regression"]
    assert rows["pabee"]["knobs"]["tolerance"]["tasks"] == ["regression"]


def test_json_goes_to_standard_output_and_the_table_for_people_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["methods", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert [row["name"] for row in json.loads(out)] == list(METHODS)
    assert main(["methods"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "deebert" in err
